from .ddim import DDIMPipeline
from .ddpm import DDPMPipeline
from .pndm import PNDMPipeline
from .stable_diffusion import StableDiffusionPipeline

__all__ = ["DDIMPipeline", "DDPMPipeline", "PNDMPipeline", "StableDiffusionPipeline"]
