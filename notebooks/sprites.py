"""The data of tiny-ddpm: 160 emoji on 10 background colours; scenes.py has tiny-emoji's, with the same colours.

Of each emoji one colour of the ten is never trained on.
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


def grid(pictures: torch.Tensor, columns: int = 8) -> Image.Image:
    """One picture of many: float (B, 3, H, W) in [0, 1], `columns` a row; an incomplete row is left out."""
    columns = min(columns, len(pictures))
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns) if len(row) == columns]
    sheet = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())
