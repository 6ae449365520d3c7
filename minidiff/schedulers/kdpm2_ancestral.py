"""KDPM2 with fresh noise in each step, as in `euler_ancestral.py`."""

import numpy as np
import torch
from torch import Tensor

from ..noise import Generators, randn_tensor
from .base import StepOutput
from .kdpm2 import KDPM2DiscreteScheduler
from .sigma import ancestral


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """The midpoint method to below the next level, in two stages, and back up to it by noise."""

    def _between(self, timesteps: np.ndarray, levels: Tensor) -> np.ndarray:
        self.ups, self.ends = ancestral(levels[:-1], levels[1:])
        # The middle of sigma and sigma_down = sigma'^2 / sigma is sigma', which the reference finds to within rounding.
        middles = levels[:-1].log().lerp(self.ends.log(), 0.5).exp()
        self.middles = torch.where(self.ends > 0, middles, levels[1:])
        return self._timesteps_of(self.middles[:-1].numpy(), np.float32)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma to sigma_down as KDPM2 goes to sigma', with sigma_mid = sqrt(sigma sigma_down), and back:

            x_mid = x + (sigma_mid - sigma) (x - x0) / sigma
            x' = x + (sigma_down - sigma) (x_mid - x0_mid) / sigma_mid + sigma_up noise

        The last interval, whose middle is 0, has the first stage alone, and no noise.
        """
        i = self._enter(model_output, timestep, sample)
        x, x0 = self._stage(model_output, sample, i)
        if i % 2:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + noise * self.ups[i // 2]
        return self._leave(x, x0, return_dict)
