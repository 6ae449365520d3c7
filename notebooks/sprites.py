"""The data of the tiny models: 160 emoji on 10 background colours, alone or two side by side, and the words for them.

Some are never trained on: of each emoji one colour of the ten, and of the duets of two emoji one in ten.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent / "data"
NAMES = FOLDER.joinpath("names.txt").read_text().splitlines()
COLOURS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (215, 35, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 230),
    "purple": (130, 50, 190),
    "pink": (255, 150, 200),
}
NO_ARTICLE = {  # plurals and what can't be counted
    *("grapes", "cherries", "broccoli", "corn", "bread", "cheese", "bacon", "french fries", "pizza", "sushi"),
    *("ice cream", "popcorn", "coffee", "beer", "scissors", "glasses", "fire"),
}
CELL, COLUMNS = 64, 16
ALONE = -1  # in the place of the right one of two emoji: there is only one


@functools.cache
def renders(size: int = 64) -> torch.Tensor:
    """Every emoji on every colour: uint8 (160, 10, 3, size, size)."""
    sheet = Image.open(FOLDER / "sprites.png")
    pictures = []
    for index in range(len(NAMES)):
        left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
        sprite = sheet.crop((left, top, left + CELL, top + CELL))
        for colour in COLOURS.values():
            picture = Image.new("RGBA", sprite.size, colour)
            picture.alpha_composite(sprite)
            pictures.append(np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).unflatten(0, (len(NAMES), len(COLOURS)))


def held_out() -> torch.Tensor:
    """bool (160, 10): the pairs that are never trained on. One colour of each emoji, each colour 16 times."""
    generator = np.random.default_rng(0)
    colours = np.concatenate([generator.permutation(len(COLOURS)) for _ in range(len(NAMES) // len(COLOURS))])
    return torch.nn.functional.one_hot(torch.from_numpy(colours), len(COLOURS)).bool()


def alone(mask: torch.Tensor) -> torch.Tensor:
    """The scenes with one emoji at every true place of a (160, 10) mask: rows of (emoji, ALONE, colour), int (N, 3)."""
    name, colour = mask.nonzero().T
    return torch.stack([name, torch.full_like(name, ALONE), colour], dim=1)


def duets(unseen: bool) -> torch.Tensor:
    """Scenes with two emoji side by side: rows of (left, right, colour), int (N, 3).

    Two emoji whose numbers end in the same digit are never shown together: with `unseen` their duets, else all others.
    In both, each emoji stands only on colours on which it may be shown alone.
    """
    shown, digit = ~held_out(), torch.arange(len(NAMES)) % 10
    together = ((digit[:, None] == digit) == unseen).fill_diagonal_(False)  # never the same emoji twice
    return (together[:, :, None] & shown[:, None] & shown[None]).nonzero()


@functools.cache
def halves() -> torch.Tensor:
    """Every emoji on every colour at half its size, half a picture wide: uint8 (160, 10, 3, 64, 32)."""
    small = renders(32)
    tall = small[..., :1, :1].expand(-1, -1, -1, 64, 32).clone()  # the corner's colour is the background's
    tall[..., 16:48, :] = small
    return tall


def render(scenes: torch.Tensor) -> torch.Tensor:
    """The pictures, uint8 (B, 3, 64, 64), of scenes (B, 3), rows of `alone` and `duets`."""
    left, right, colour = scenes.T
    two = torch.cat([halves()[left, colour], halves()[right, colour]], dim=3)
    return torch.where((right == ALONE)[:, None, None, None], renders()[left, colour], two)


def pairs(mask: torch.Tensor) -> list[tuple[str, str]]:
    """The (name, colour) of every true place of a (160, 10) mask."""
    colours = list(COLOURS)
    return [(NAMES[name], colours[colour]) for name, colour in mask.nonzero().tolist()]


def grid(pictures: torch.Tensor, columns: int = 8) -> Image.Image:
    """One picture of many: float (B, 3, H, W) in [0, 1], `columns` a row; an incomplete row is left out."""
    columns = min(columns, len(pictures))
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns) if len(row) == columns]
    sheet = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def phrase(name: str) -> str:
    """`name` with its article: "a red apple", "an owl", "grapes"."""
    if name in NO_ARTICLE:
        return name
    return f"an {name}" if name[0] in "aeo" or name == "umbrella" else f"a {name}"


def prompts(name: str, colour: str, beside: str | None = None) -> list[str]:
    """The ways to ask for one picture; the last two leave the colour open. Evaluation asks in the first way.

    `beside` is the emoji on the right, where there are two.
    """
    thing = phrase(name)
    if beside is not None:
        thing, name = f"{thing} and {phrase(beside)}", f"{name} and {beside}"
    return [
        f"{thing} on a{'n' * (colour == 'orange')} {colour} background",
        f"{name}, {colour} background",
        thing,
        name,
    ]


def scene_prompts(scene: list[int]) -> list[str]:
    """The ways to ask for a scene, a row of `alone` or `duets`."""
    left, right, colour = scene
    return prompts(NAMES[left], list(COLOURS)[colour], None if right == ALONE else NAMES[right])


def words() -> list[str]:
    """Every word of every prompt, in alphabetical order."""
    everything = {prompt for name in NAMES for colour in COLOURS for prompt in prompts(name, colour, beside=name)}
    return sorted({word for prompt in everything for word in prompt.replace(",", "").split()})
