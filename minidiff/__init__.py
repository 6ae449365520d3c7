"""Stable Diffusion in one evening's reading. The public names; each file says what it is about in its first lines."""

from pathlib import Path

from .loading.config import ConfigError, LoadError
from .missing import getter
from .models import (
    AutoencoderKL,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
    UNet2DModel,
)
from .pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    PNDMPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from .schedulers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

__version__ = "0.1.0"

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "ConfigError",
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "DiffusionPipeline",
    "EulerDiscreteScheduler",
    "LoadError",
    "PNDMPipeline",
    "PNDMScheduler",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionSafetyChecker",
    "StableDiffusionUpscalePipeline",
    "UNet2DConditionModel",
    "UNet2DModel",
    "bundled",
]

DOORS = ("image_processor", "optimization", "training_utils", "utils")  # where documentation finds its helpers
__getattr__ = getter(__name__, __all__, DOORS)


def bundled(name: str) -> Path:
    """The folder of a model that comes with the package: "tiny-emoji" or "tiny-ddpm". Raises ValueError for others."""
    folders = Path(__file__).parent / "bundled"
    names = sorted(folder.parent.name for folder in folders.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"name={name!r} is not bundled; there are: {', '.join(names)}")
    return folders / name
