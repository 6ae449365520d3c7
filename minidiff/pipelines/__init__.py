"""Whole systems: which models and scheduler belong together, and in what order they run."""

from ..missing import getter
from .base import DiffusionPipeline
from .text_to_image import StableDiffusionPipeline
from .unconditional import DDIMPipeline, DDPMPipeline, PNDMPipeline

__all__ = ["DDIMPipeline", "DDPMPipeline", "DiffusionPipeline", "PNDMPipeline", "StableDiffusionPipeline"]
__getattr__ = getter(__name__, __all__)
