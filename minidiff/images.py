"""Pictures: files, PIL images, arrays and tensors, and the ways between them.

Outside of models a picture's values are in [0, 1], inside in [-1, 1]. Arrays are (B, H, W, C), tensors (B, C, H, W).
"""

import io
import os
import urllib.request
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TIMEOUT = 60  # seconds for a picture's server to answer


def check_output_type(output_type: str, supported: tuple[str, ...] = OUTPUT_TYPES) -> None:
    if output_type not in supported:
        raise ValueError(f"output_type={output_type!r} is not supported; supported: {', '.join(supported)}")


def to_output(pictures: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """(B, C, H, W) in [-1, 1] -> in [0, 1], "pt": the same shape; "np": (B, H, W, C), float32; "pil": a list.

    Raises FloatingPointError for pictures that aren't finite: a VAE can overflow in float16.
    """
    return as_output(denormalize(check_finite_pictures(pictures)), output_type)


def check_finite_pictures(pictures: Tensor) -> Tensor:
    """Returns `pictures`, or raises FloatingPointError."""
    if not pictures.isfinite().all():
        raise FloatingPointError("the pictures aren't finite, though what they were made from is: try torch.float32")
    return pictures


def as_output(pictures: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """(B, C, H, W) in [0, 1] as `to_output` returns it."""
    if output_type == "pt":
        return pictures
    arrays = pictures.cpu().permute(0, 2, 3, 1).float().numpy()  # (B, C, H, W) -> (B, H, W, C)
    return arrays if output_type == "np" else to_pil(arrays)


def normalize(pictures: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """[0, 1] -> [-1, 1]."""
    return 2.0 * pictures - 1.0


def denormalize(pictures: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """[-1, 1] -> [0, 1]; what lies outside is cut off."""
    return (pictures * 0.5 + 0.5).clip(0, 1)


def to_pil(arrays: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) or (H, W, C) in [0, 1], C 1, 3 or 4 -> a list of pictures."""
    arrays = arrays[None] if arrays.ndim == 3 else arrays
    whole = (arrays * 255).round().astype(np.uint8)
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in whole]


def pt_to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, C, H, W) in [-1, 1] -> a list of pictures."""
    return as_output(denormalize(pictures), "pil")


def load_image(
    image: str | os.PathLike | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """The picture in a file, at an http(s) URL, or itself; upright, as its EXIF says, and in RGB, or as
    `convert_method` makes it.

    Raises ValueError for what is none of these, OSError for what can't be had or isn't a picture.
    """
    if isinstance(image, Image.Image):
        picture, where = image, "the picture"
    elif isinstance(image, str | os.PathLike):
        where = os.fspath(image)
        if where.startswith(("http://", "https://")):
            source = io.BytesIO(_download(where))
        elif os.path.isfile(where):
            source = where
        else:
            raise ValueError(f"image={where!r} is no file here, and no URL that begins with http:// or https://")
        try:
            picture = Image.open(source)
            picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
            raise OSError(f"{where}: not a picture that PIL can read: {error}") from None
    else:
        raise ValueError(f"image must be a path, a URL or a PIL image, not {type(image).__name__}")
    picture = ImageOps.exif_transpose(picture)
    return picture.convert("RGB") if convert_method is None else convert_method(picture)


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "minidiff"})  # some servers refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, ValueError) as error:  # HTTPError, URLError and timeouts are OSErrors
        raise OSError(f"{url}: can't be downloaded: {error}") from None


def make_image_grid(images: list[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """`rows` x `cols` pictures of one size, row by row; each made `resize` x `resize` first, if that is given."""
    if len(images) != rows * cols or not images:
        raise ValueError(f"images are {len(images)}, but rows x cols is {rows} x {cols}: they must agree")
    return _grid([image.resize((resize, resize)) for image in images] if resize else images, cols)


def make_grid(pictures: list[Image.Image], scale: int = 1) -> Image.Image:
    """Pictures of one size side by side, row by row: in a square, or with one column more than rows. Enlarged `scale`
    times, pixels stay sharp."""
    grid = _grid(pictures, columns=int(np.ceil(np.sqrt(len(pictures)))))
    return grid.resize((grid.width * scale, grid.height * scale), resample=Image.Resampling.NEAREST)


def _grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid
