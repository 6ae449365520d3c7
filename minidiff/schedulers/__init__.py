"""The samplers. Each file is one; `schedule.py` has the noise schedules, `base.py` and `sigma.py` what is shared."""

from .ddim import DDIMScheduler
from .ddim_inverse import DDIMInverseScheduler
from .ddpm import DDPMScheduler
from .euler import EulerDiscreteScheduler
from .lcm import LCMScheduler
from .pndm import PNDMScheduler
from .tcd import TCDScheduler

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
]
