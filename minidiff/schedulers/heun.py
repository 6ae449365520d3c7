"""Heun's method in the noise level: the mean of two slopes (Elucidating the design space, arXiv 2206.00364, alg. 1)."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..loading.config import Share
from .base import StepOutput
from .sigma import KarrasConfig, TwoStageScheduler


@dataclass(frozen=True, eq=False)
class HeunDiscreteConfig(KarrasConfig):
    """The keys of HeunDiscreteScheduler. The defaults of the betas are Stable Diffusion's."""

    beta_start: Share = 0.00085
    beta_end: Share = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"
    _: KW_ONLY
    clip_sample: bool = False
    clip_sample_range: float = 1.0


class HeunDiscreteScheduler(TwoStageScheduler):
    """Second order: two model calls an interval, but for the last one."""

    Config = HeunDiscreteConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Plans `num_inference_steps` intervals, over the first `num_train_timesteps` of the training's timesteps if
        given; or the descending `timesteps`. All but the first are visited twice: 2n - 1 model calls."""
        self._plan(num_inference_steps, device, timesteps, num_train_timesteps=num_train_timesteps)
        if timesteps is not None:
            # What image-to-image takes its strength of: right would be the intervals, as above. The reference's
            # pipelines count the calls where timesteps are given, and begin later, or, at a half and less, nowhere
            self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma to sigma', first by Euler's step, then from the same x again with the mean of both ends' slopes:

            slope = (x - x0) / sigma,        x' = x + (sigma' - sigma) slope
            slope' = (x' - x0') / sigma',    x' = x + (sigma' - sigma) (slope + slope') / 2

        The last interval has the first stage alone: at 0 there is no slope.
        """
        i = self._enter(model_output, timestep, sample)
        sigma = self.sigmas[i]
        x0 = self._bound(self._x0(model_output, sample, sigma))
        slope = (sample - x0) / sigma

        if i % 2 == 0:
            self.history = (sample, slope)
            x = sample + slope * (self.sigmas[i + 1] - sigma)
        else:
            (start, first), self.history = self.history, ()
            x = start + (first + slope) / 2 * (sigma - self.sigmas[i - 1])
        return self._leave(x, x0, return_dict)
