"""The samplers. Each file is one, and `base.py` is what they share."""

from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .pndm import PNDMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"]
