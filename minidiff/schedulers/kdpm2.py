"""KDPM2: the midpoint method in the noise level (DPM-Solver-2, arXiv 2206.00927, algorithm 1, in the VE reading)."""

from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from ..loading.config import Share
from .base import StepOutput
from .sigma import KarrasConfig, TwoStageScheduler


@dataclass(frozen=True, eq=False)
class KDPM2DiscreteConfig(KarrasConfig):
    """The keys of KDPM2DiscreteScheduler. The defaults of the betas are Stable Diffusion's."""

    beta_start: Share = 0.00085
    beta_end: Share = 0.012
    _: KW_ONLY


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """Second order: the slope at the geometric middle of each interval leads over the whole of it."""

    Config = KDPM2DiscreteConfig
    rounded = True

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """Plans `num_inference_steps` intervals, over the first `num_train_timesteps` of the training's timesteps if
        given. Between the levels' timesteps stand those of the middles: 2n - 1 model calls."""
        self._plan(num_inference_steps, device, num_train_timesteps=num_train_timesteps)

    def _between(self, timesteps: np.ndarray, levels: Tensor) -> np.ndarray:
        self.ends = levels[1:]
        self.middles = self.ends.log().lerp(levels[:-1].log(), 0.5).exp()
        return self._timesteps_of(self.middles[:-1].numpy(), np.float32)

    def _seen(self, i: int) -> Tensor:
        return self.middles[i // 2] if i % 2 else self.sigmas[i]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma to sigma', first to sigma_mid = sqrt(sigma sigma'), then from the same x again:

            x_mid = x + (sigma_mid - sigma) (x - x0) / sigma
            x' = x + (sigma' - sigma) (x_mid - x0_mid) / sigma_mid

        The last interval, whose middle is 0, has the first stage alone.
        """
        i = self._enter(model_output, timestep, sample)
        return self._leave(*self._stage(model_output, sample, i), return_dict)

    def _stage(self, predicted: Tensor, sample: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The sample after one of the two stages, and x0."""
        sigma, middle, end = self.sigmas[i - i % 2], self.middles[i // 2], self.ends[i // 2]
        x0 = self._x0(predicted, sample, self._seen(i))
        slope = (sample - x0) / self._seen(i)
        if i % 2 == 0:
            self.history = (sample,)
            return sample + slope * (middle - sigma), x0
        (start,), self.history = self.history, ()
        return start + slope * (end - sigma), x0
