"""Whole systems: which models and scheduler belong together, and in what order they run."""

from ..missing import getter
from .auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from .base import DiffusionPipeline
from .depth import StableDiffusionDepth2ImgPipeline
from .image_to_image import StableDiffusionImg2ImgPipeline
from .image_variation import StableDiffusionImageVariationPipeline
from .inpaint import StableDiffusionInpaintPipeline
from .instruct_pix2pix import StableDiffusionInstructPix2PixPipeline
from .text_to_image import StableDiffusionPipeline
from .unconditional import DDIMPipeline, DDPMPipeline, PNDMPipeline
from .upscale import StableDiffusionUpscalePipeline

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "PNDMPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
]
__getattr__ = getter(__name__, __all__)
