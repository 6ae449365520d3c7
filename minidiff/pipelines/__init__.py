"""Whole systems: which models and scheduler belong together, and in what order they run."""

from ..missing import getter
from .auto import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from .base import DiffusionPipeline
from .controlnet import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
)
from .depth import StableDiffusionDepth2ImgPipeline
from .image_to_image import StableDiffusionImg2ImgPipeline
from .image_variation import StableDiffusionImageVariationPipeline
from .inpaint import StableDiffusionInpaintPipeline
from .instruct_pix2pix import StableDiffusionInstructPix2PixPipeline
from .latent_consistency import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline
from .latent_diffusion import LDMPipeline, LDMSuperResolutionPipeline
from .latent_diffusion_text import LDMTextToImagePipeline
from .noise_levels import KarrasVePipeline, RePaintPipeline, ScoreSdeVePipeline
from .text_to_image import StableDiffusionPipeline
from .unconditional import DDIMPipeline, DDPMPipeline, PNDMPipeline
from .upscale import StableDiffusionUpscalePipeline
from .xl import StableDiffusionXLPipeline
from .xl_controlnet import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from .xl_image_to_image import StableDiffusionXLImg2ImgPipeline
from .xl_inpaint import StableDiffusionXLInpaintPipeline

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "KarrasVePipeline",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LDMTextToImagePipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "PNDMPipeline",
    "RePaintPipeline",
    "ScoreSdeVePipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
]
__getattr__ = getter(__name__, __all__)
