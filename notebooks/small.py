"""The data of tiny-ddpm: pictures of 32x32 of one of 16 things, in four styles, at four places, on any colour.

256 drawings, then, and no end of pictures. POOL of them are trained on, and as many others serve to tell whether a
model copies.
"""

import functools

import scenes
import sprites
import torch
import torch.nn.functional as F
from torch import Tensor

THINGS = """
fox · panda · frog · penguin · owl · ladybug · tropical fish · whale
cactus · mushroom · red apple · banana · rocket · sailboat · ghost · star
"""
THINGS = [name for line in THINGS.strip().splitlines() for name in line.split(" · ")]
# 8 of 32 pixels apart, one step of the coarsest level of the UNet, for which a thing moved so is the same thing
# elsewhere. Moved by 4 it would be another, to be learned too
PLACES = [(24.0, 24.0), (40.0, 24.0), (24.0, 40.0), (40.0, 40.0)]  # of 64
SIDE = 44.0
SHAPE = (len(THINGS), len(scenes.STYLES), len(PLACES))  # of the numbers of drawings
POOL = 20_480


@functools.cache
def drawings() -> Tensor:
    """RGBA, colours times alpha, float (256, 4, 32, 32) in [0, 1]."""
    thing, style, place = torch.cartesian_prod(*map(torch.arange, SHAPE)).T
    thing = torch.tensor([scenes.THINGS.index(name) for name in THINGS])[thing]
    pose = F.pad(torch.tensor(PLACES)[place], (0, 1), value=SIDE)
    papers = (torch.full((len(thing), 3, 64, 64), value) for value in (0.0, 1.0))
    black, white = (F.avg_pool2d(scenes.place_on(paper, style, thing, pose), 2) for paper in papers)
    return torch.cat([black, 1 - (white - black).mean(dim=1, keepdim=True)], dim=1)


def render(number: Tensor, colour: Tensor) -> Tensor:
    """The pictures of drawings (N,) on colours (N, 3): (N, 3, 32, 32) in [0, 1]."""
    drawn = drawings()[number]
    return drawn[:, :3] + (1 - drawn[:, 3:]) * colour[:, :, None, None]


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random drawings, (n,), and colours, (n, 3): each a mixture of two of the ten."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(sprites.COLOURS.values())) / 255
    one, other = palette[torch.randint(len(palette), (2, n), generator=generator)]
    number = torch.randint(len(drawings()), (n,), generator=generator)
    return number, one.lerp(other, torch.rand(n, 1, generator=generator))


def trained() -> tuple[Tensor, Tensor]:
    """Those that are trained on."""
    return draw(POOL, seed=0)


def apart(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, 3, 32, 32) and each drawing, on the colour that suits best: the root mean square difference, (B, 256), and
    the colour, (B, 256, 3)."""
    drawn = drawings().flatten(2)
    rgb, paper = drawn[:, :3], 1 - drawn[:, 3:]
    rest = pictures.flatten(2)[:, None] - rgb  # (B, 256, 3, 1024)
    colour = (rest * paper).sum(dim=-1) / paper.square().sum(dim=-1)  # least squares
    return (rest - paper * colour[..., None]).square().mean(dim=(2, 3)).sqrt(), colour


def nearest(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of float (B, 3, 32, 32) in [0, 1]: the nearest drawing's number, its distance, and whether the picture surely
    shows its thing, (B,) each.

    It does where the distance is less than half of that from the nearest render to any of another thing, so that the
    picture can't lie nearer to one of those.
    """
    thing, found = torch.unravel_index(torch.arange(len(drawings())), SHAPE)[0], []
    for some in pictures.split(16):
        distances, colours = apart(some)
        distance, number = distances.min(dim=1)
        there = render(number, colours[torch.arange(len(some)), number])
        to_others = apart(there)[0].where(thing != thing[number][:, None], torch.inf).min(dim=1).values
        found.append((number, distance, distance < to_others / 2))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def copied(pictures: Tensor, number: Tensor) -> float:
    """The share of (B, 3, 32, 32) that lies nearer to a picture of its drawing, (B,), that was trained on than to any
    other, of which there are as many in all. What is as near to both, on one of the ten colours, counts half."""
    pools, share = [trained(), draw(POOL, seed=1)], 0.0
    for picture, n in zip(pictures, number, strict=True):
        every = (render(numbers[numbers == n], colours[numbers == n]) for numbers, colours in pools)
        seen, unseen = ((some - picture).square().mean(dim=(1, 2, 3)).min().item() for some in every)
        share += ((seen < unseen) + (seen <= unseen)) / 2
    return share / len(pictures)
