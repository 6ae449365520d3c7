"""The data of both models: 80 things in four styles on 10 background colours, alone or two side by side, in any pose.

A scene says what is in a picture and where; its prompts leave words out, so that a prompt is a distribution: "a fox" is
in any style, anywhere, on any colour. Some scenes are never trained on; `unseen` has them. (tiny-ddpm, which has no
prompts, learns from half of the scenes that `large` has.)
"""

import functools
from dataclasses import dataclass, fields, replace

import numpy as np
import sprites
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

THINGS = """
fox · bear · panda · lion · frog · monkey · penguin · owl · bat · unicorn · bee · butterfly · snail · ladybug
spider · turtle · snake · octopus · crab · tropical fish · whale · tiger · zebra · elephant · giraffe · cow · pig
sheep · rabbit · duck · flamingo · cat · dog · cactus · christmas tree · palm tree · mushroom · rose · sunflower
maple leaf · red apple · lemon · banana · watermelon · grapes · strawberry · cherries · pineapple · carrot
avocado · cheese · hamburger · french fries · pizza · doughnut · birthday cake · ice cream · coffee · car · bus
bicycle · locomotive · rocket · sailboat · soccer ball · guitar · die · gift · balloon · bell · key · umbrella
crown · pumpkin · ghost · robot · snowman · star · heart · house
"""
THINGS = [name for line in THINGS.strip().splitlines() for name in line.split(" · ")]
FEW = """
fox · panda · frog · penguin · owl · ladybug · tropical fish · whale
cactus · mushroom · red apple · banana · rocket · sailboat · ghost · star
"""
FEW = [name for line in FEW.strip().splitlines() for name in line.split(" · ")]  # tiny-ddpm's
STYLES = ["flat", "glossy", "detailed", "inked"]
SIZES = ["small", "large"]
SIDES = [28.0, 44.0]  # in pixels
HEIGHTS = [24.0, 40.0]  # of the middle of a thing
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
COLOURS = list(sprites.COLOURS)
ALONE = -1  # in the place of the right one of two things: there is only one
INK = 58 / 64  # of a cell is the longer side of what is drawn in it


@dataclass
class Scenes:
    """N pictures: numbers of words, and for each of the two things how it stands."""

    things: Tensor  # (N, 2), left and right; the right one may be ALONE
    style: Tensor  # (N,)
    colour: Tensor  # (N,)
    size: Tensor  # (N,), of a thing alone; two are always small
    place: Tensor  # (N,), of a thing alone; 1 for two
    pose: Tensor  # (N, 2, 3): centre x, y and longer side, in pixels

    def __getitem__(self, index) -> "Scenes":
        return Scenes(*(column[index] for column in self.columns))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def alone(self) -> Tensor:
        return self.things[:, 1] == ALONE

    def __len__(self) -> int:
        return len(self.columns[0])


def join(*several: Scenes) -> Scenes:
    return Scenes(*(torch.cat(columns) for columns in zip(*(scenes.columns for scenes in several), strict=True)))


@functools.cache
def held_out() -> tuple[Tensor, Tensor]:
    """Never trained on, as bool (80, 10) and (80, 4, 3): of each thing one colour, and one style at one place."""
    generator, n = np.random.default_rng(0), len(THINGS)
    colours = np.concatenate([generator.permutation(10) for _ in range(n // 10)])
    corners = np.concatenate([generator.permutation(12) for _ in range(-(-n // 12))])[:n]
    colour = F.one_hot(torch.from_numpy(colours), 10).bool()
    return colour, F.one_hot(torch.from_numpy(corners), 12).bool().unflatten(1, (4, 3))


def may_be_shown(scenes: Scenes) -> Tensor:
    """bool (N,): no colour, style at a place, or pair of a scene is held out.

    Two things whose numbers end in the same digit are never shown together.
    """
    colour, corner = held_out()
    first, second = scenes.things.T
    other = second.clamp(min=0)
    single = ~corner[first, scenes.style, scenes.place]
    both = (first % 10 != second % 10) & ~colour[other, scenes.colour]
    return ~colour[first, scenes.colour] & torch.where(scenes.alone, single, both)


def pose(size: Tensor, place: Tensor, alone: Tensor, generator: torch.Generator) -> Tensor:
    """Random poses (N, 2, 3) of things of a size at a place, or of two side by side.

    Places lie 8 pixels apart, the side of a latent: moved so far, a thing's latents move along and change by 3 to 5 %
    (root mean square). Moved by 4 pixels they are others altogether, and the UNet would learn each thing many times.
    """
    n = len(size)
    one_x = 32 + (place - 1) * torch.where(size == 1, 8.0, 16.0)
    x = torch.where(alone[:, None], one_x[:, None], torch.tensor([16.0, 48.0]))
    y = torch.tensor(HEIGHTS)[torch.randint(len(HEIGHTS), (n, 2), generator=generator)]
    side = torch.tensor(SIDES)[size][:, None].expand(-1, 2)
    return torch.stack([x, y, side], dim=2)


def scene(
    *names: str,
    style: str = "detailed",
    colour: str = "white",
    size: str = "large",
    place: str = "middle",
    height: float = HEIGHTS[0],
) -> Scenes:
    """One scene, of one thing or of two side by side, which are small."""
    alone = torch.tensor([len(names) == 1])
    numbers = [THINGS.index(name) for name in names] + [ALONE] * (2 - len(names))
    size_number = torch.where(alone, SIZES.index(size), 0)
    place_number = torch.where(alone, list(PLACES).index(place), 1)
    poses = pose(size_number, place_number, alone, torch.Generator())
    poses[:, :, 1] = height
    words = (torch.tensor([STYLES.index(style)]), torch.tensor([COLOURS.index(colour)]))
    return Scenes(torch.tensor([numbers]), *words, size_number, place_number, poses)


def at_every_height(one: Scenes) -> Scenes:
    """The scenes that the words for a thing alone leave open."""
    poses = one.pose[0].repeat(len(HEIGHTS), 1, 1)
    poses[:, :, 1] = torch.tensor(HEIGHTS)[:, None]
    return replace(one[torch.zeros(len(HEIGHTS), dtype=torch.long)], pose=poses)


def draw(n: int, generator: torch.Generator, share_alone: float = 0.6) -> Scenes:
    """Random scenes, held out or not."""

    def number(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    alone = torch.rand(n, generator=generator) < share_alone
    first = number(len(THINGS))
    second = (first + 1 + number(len(THINGS) - 1)) % len(THINGS)  # never the same thing twice
    size, place = torch.where(alone, number(2), 0), torch.where(alone, number(3), 1)
    things = torch.stack([first, torch.where(alone, ALONE, second)], dim=1)
    return Scenes(things, number(len(STYLES)), number(10), size, place, pose(size, place, alone, generator))


def trained(n: int, seed: int = 0, share_alone: float = 0.6) -> Scenes:
    """Random scenes of those that may be trained on."""
    scenes = draw(n * 3 // 2 + 64, torch.Generator().manual_seed(seed), share_alone)
    return scenes[may_be_shown(scenes).nonzero()[:n, 0]]


@functools.cache
def large() -> tuple[Scenes, Tensor]:
    """All 2,560 scenes of one of FEW, large, not in the middle; and bool (2560,), tiny-ddpm's: a random half of them.

    From left to right, and down, it is 8 of 32 pixels: one step of the coarsest level of the UNet, for which a thing
    moved so is the same thing elsewhere. Moved by 4 it would be another, to be learned too.
    """
    counts = [len(FEW), len(STYLES), len(COLOURS), 2, len(HEIGHTS)]
    thing, style, colour, place, height = torch.cartesian_prod(*map(torch.arange, counts)).T
    place = 2 * place  # left or right
    thing = torch.tensor([THINGS.index(name) for name in FEW])[thing]
    one = torch.ones_like(thing)
    poses = pose(one, place, one.bool(), torch.Generator())
    poses[:, :, 1] = torch.tensor(HEIGHTS)[height][:, None]
    scenes = Scenes(torch.stack([thing, ALONE * one], dim=1), style, colour, one, place, poses)
    return scenes, torch.randperm(len(one), generator=torch.Generator().manual_seed(0)) % 2 == 0


def unseen(kind: str, n: int, seed: int = 1) -> Scenes:
    """Random scenes that are held out in one way alone: in their "colour", "corner" (style and place), or "pair"."""
    scenes = draw(n * 30 + 640, torch.Generator().manual_seed(seed), share_alone=0.0 if kind == "pair" else 1.0)
    colour, corner = held_out()
    first, second = scenes.things.T
    new_colour = colour[first, scenes.colour]
    new_corner = corner[first, scenes.style, scenes.place]
    new_pair = first % 10 == second % 10
    kinds = {
        "colour": new_colour & ~new_corner,
        "corner": new_corner & ~new_colour,
        "pair": new_pair & ~new_colour & ~colour[second, scenes.colour],
    }
    return scenes[kinds[kind].nonzero()[:n, 0]]


@functools.cache
def cells() -> tuple[Tensor, Tensor]:
    """The sheets, at 64x64 and 32x32: float (4 styles, 80 things, RGBA, side, side) in [0, 1], colours times alpha."""
    numbers = [sprites.NAMES.index(name) for name in THINGS]
    sheets = []
    for style in STYLES:
        sheet = np.asarray(Image.open(sprites.FOLDER / f"{style}.png").convert("RGBA"))
        rows, columns = (side // sprites.CELL for side in sheet.shape[:2])
        every = sheet.reshape(rows, sprites.CELL, columns, sprites.CELL, 4).transpose(0, 2, 4, 1, 3)
        sheets.append(torch.from_numpy(every.reshape(rows * columns, 4, sprites.CELL, sprites.CELL)[numbers]) / 255)
    large = torch.stack(sheets)
    large[:, :, :3] *= large[:, :, 3:]
    return large, F.avg_pool2d(large.flatten(0, 1), 2).unflatten(0, large.shape[:2])


def place_on(picture: Tensor, style: Tensor, thing: Tensor, pose: Tensor) -> Tensor:
    """`picture` (B, 3, 64, 64) with a thing each on it, in its pose (B, 3)."""
    x, y, side = pose.T
    axis = torch.arange(64) + 0.5
    pixel = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (64, 64, 2), x and y
    grid = (pixel - torch.stack([x, y], 1)[:, None, None]) * (2 * INK / side)[:, None, None, None]  # -1..1: the cell
    large, small = cells()
    drawn = picture.new_empty(len(picture), 4, 64, 64)
    for sheet, these in ((large, side >= 36), (small, side < 36)):
        drawn[these] = F.grid_sample(sheet[style[these], thing[these]], grid[these], align_corners=False)
    return picture * (1 - drawn[:, 3:]) + drawn[:, :3]


def render(scenes: Scenes) -> Tensor:
    """The pictures of scenes, float (B, 3, 64, 64) in [0, 1]."""
    palette = torch.tensor(list(sprites.COLOURS.values())) / 255
    picture = palette[scenes.colour][:, :, None, None].expand(-1, -1, 64, 64)
    picture = place_on(picture, scenes.style, scenes.things[:, 0], scenes.pose[:, 0]).clone()
    two = ~scenes.alone
    if two.any():
        some = scenes[two]
        picture[two] = place_on(picture[two], some.style, some.things[:, 1], some.pose[:, 1])
    return picture


def small_render(scenes: Scenes) -> Tensor:
    """The same at half the size, (B, 3, 32, 32)."""
    return torch.cat([F.avg_pool2d(render(scenes[some]), 2) for some in torch.arange(len(scenes)).split(256)])


def phrase(name: str, adjectives: str = "") -> str:
    """`name` with its article and adjectives: "a red apple", "an inked owl", "grapes"."""
    if name in sprites.NO_ARTICLE:
        return f"{adjectives}{name}"
    first = f"{adjectives}{name}"
    return f"an {first}" if first[0] in "aeio" or first == "umbrella" else f"a {first}"


def prompt(
    things: list[str],
    style: str | None = None,
    colour: str | None = None,
    size: str | None = None,
    place: str | None = None,
    bare: bool = False,
) -> str:
    """The words for a scene; what isn't given may be anything. Bare prompts have no articles and no "on a"."""
    adjectives = "".join(f"{word} " for word in (size, style) if word)
    named = " and ".join(f"{adjectives}{name}" if bare else phrase(name, adjectives) for name in things)
    where = f" {PLACES[place]}" if place else ""
    if not colour:
        return named + where
    return f"{named}{where}, {colour} background" if bare else f"{named}{where} on {phrase(colour)} background"


def prompts(scenes: Scenes, ask: str = "style colour size place") -> list[str]:
    """One for each scene, with what is asked for."""
    wanted = ask.split()
    result = []
    for i in range(len(scenes)):
        things, single = [THINGS[n] for n in scenes.things[i].tolist() if n != ALONE], scenes.things[i, 1] == ALONE
        words = {"style": STYLES[scenes.style[i]], "colour": COLOURS[scenes.colour[i]]}
        if single:
            words |= {"size": SIZES[scenes.size[i]], "place": list(PLACES)[scenes.place[i]]}
        result.append(prompt(things, **{key: word for key, word in words.items() if key in wanted}))
    return result


def random_prompts(scenes: Scenes) -> list[str]:
    """One for each scene, of which any word may be missing; the empty prompt, for guidance, in one of ten."""
    result = []
    for scene, chance in zip(zip(*(column.tolist() for column in scenes.columns[:5]), strict=True),
                             torch.rand(len(scenes), 6).tolist(), strict=True):  # fmt: skip
        things, style, colour, size, place = scene
        if chance[0] < 0.1:
            result.append("")
            continue
        single = things[1] == ALONE
        result.append(
            prompt(
                [THINGS[n] for n in things if n != ALONE],
                STYLES[style] if chance[1] < 0.6 else None,
                COLOURS[colour] if chance[2] < 0.8 else None,
                SIZES[size] if single and chance[3] < 0.5 else None,
                list(PLACES)[place] if single and chance[4] < 0.5 else None,
                bare=chance[5] < 0.25,
            )
        )
    return result


def words() -> list[str]:
    """Every word of every prompt, in alphabetical order."""
    everything = (
        {phrase(name, f"{word} ") for name in THINGS for word in (*STYLES, *SIZES)}
        | {prompt([name], colour=colour, place=place) for name in THINGS for colour in COLOURS for place in PLACES}
        | {phrase(name) for name in THINGS}
        | {"and"}
    )
    return sorted({word for text in everything for word in text.split()})
