"""Pictures as tensors, arrays and files."""

import numpy as np
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str, supported: tuple[str, ...] = OUTPUT_TYPES) -> None:
    if output_type not in supported:
        raise ValueError(f"output_type={output_type!r} is not supported; supported: {', '.join(supported)}")


def to_output(pictures: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """(B, C, H, W) in [-1, 1] -> in [0, 1], "pt": the same shape; "np": (B, H, W, C), float32; "pil": a list.

    Raises FloatingPointError for pictures that aren't finite: a VAE can overflow in float16.
    """
    if not pictures.isfinite().all():
        raise FloatingPointError("the pictures aren't finite, though what they were made from is: try torch.float32")
    pictures = (pictures * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return pictures
    arrays = pictures.cpu().permute(0, 2, 3, 1).float().numpy()  # (B, C, H, W) -> (B, H, W, C)
    return arrays if output_type == "np" else to_pil(arrays)


def to_pil(arrays: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) in [0, 1], C 1, 3 or 4 -> a list of pictures."""
    whole = (arrays * 255).round().astype(np.uint8)
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in whole]


def make_grid(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, row by row: in a square, or with one column more than rows."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid
