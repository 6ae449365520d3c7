"""The samplers. Each file is one; `schedule.py` has the noise schedules, `base.py` and `sigma.py` what is shared."""

from ..missing import getter
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .euler import EulerDiscreteScheduler
from .pndm import PNDMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]
__getattr__ = getter(__name__, __all__)
