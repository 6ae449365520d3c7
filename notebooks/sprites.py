"""What the sheets of emoji in data/ hold, and the colours that pictures are put on."""

from pathlib import Path

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
CELL = 64  # pixels; 16 cells a row


def grid(pictures: torch.Tensor, columns: int = 8) -> Image.Image:
    """One picture of many: float (B, 3, H, W) in [0, 1], `columns` a row; an incomplete row is left out."""
    columns = min(columns, len(pictures))
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns) if len(row) == columns]
    sheet = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())
