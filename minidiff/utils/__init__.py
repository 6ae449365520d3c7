"""The small helpers that documentation imports from `diffusers.utils`: pictures, noise, logging."""

from ..image_processor import INTERPOLATION as PIL_INTERPOLATION
from ..images import load_image, make_image_grid, pt_to_pil
from ..images import to_pil as numpy_to_pil
from ..missing import getter
from . import logging, torch_utils
from .logging import get_logger

__all__ = [
    "PIL_INTERPOLATION",
    "get_logger",
    "load_image",
    "logging",
    "make_image_grid",
    "numpy_to_pil",
    "pt_to_pil",
    "torch_utils",
]
__getattr__ = getter(__name__, __all__)
