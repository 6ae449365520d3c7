"""Whole systems: which models and scheduler belong together, and in what order they run."""

from ..missing import getter
from .base import DiffusionPipeline
from .image_to_image import StableDiffusionImg2ImgPipeline
from .inpaint import StableDiffusionInpaintPipeline
from .latent_consistency import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline
from .latent_diffusion import LDMPipeline, LDMSuperResolutionPipeline
from .noise_levels import KarrasVePipeline, RePaintPipeline, ScoreSdeVePipeline
from .text_to_image import StableDiffusionPipeline
from .unconditional import DDIMPipeline, DDPMPipeline, PNDMPipeline
from .xl import StableDiffusionXLPipeline
from .xl_image_to_image import StableDiffusionXLImg2ImgPipeline
from .xl_inpaint import StableDiffusionXLInpaintPipeline

__all__ = [
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "PNDMPipeline",
    "RePaintPipeline",
    "ScoreSdeVePipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
]
__getattr__ = getter(__name__, __all__)
