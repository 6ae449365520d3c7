"""The samplers. Each file is one; `schedule.py` has the noise schedules, `base.py` and `sigma.py` what is shared."""

from .ddim import DDIMScheduler
from .ddim_inverse import DDIMInverseScheduler
from .ddpm import DDPMScheduler
from .euler import EulerDiscreteScheduler
from .flow_match_euler import FlowMatchEulerDiscreteScheduler
from .karras_ve import KarrasVeScheduler
from .lcm import LCMScheduler
from .pndm import PNDMScheduler
from .repaint import RePaintScheduler
from .score_sde_ve import ScoreSdeVeScheduler
from .tcd import TCDScheduler

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "KarrasVeScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "TCDScheduler",
]
