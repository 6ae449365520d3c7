"""DDIM backwards, from a picture to the noise that draws it (Song et al., arXiv 2010.02502, section 4.3)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Scheduler, SchedulerConfig, StepOutput


@dataclass(frozen=True, eq=False, kw_only=True)
class DDIMInverseConfig(SchedulerConfig):
    """The keys of DDIMInverseScheduler."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True  # whether the first step begins at alpha_bar 1, free of noise, or at timestep 0's
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    rescale_betas_zero_snr: bool = False


class DDIMInverseScheduler(Scheduler):
    """The same curve, walked to more noise. `timesteps` ascend."""

    Config = DDIMInverseConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._begin(self.grid.flip(0))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`."""
        grid = self._spaced(num_inference_steps).round().astype("int64")[::-1].copy()
        starts_clean = grid[0] - len(self) // len(grid) < 0 and self.final_alpha_cumprod == 1
        if starts_clean and self.config.prediction_type == "sample":
            raise ValueError("prediction_type='sample' gives no eps where there is no noise: set_alpha_to_one=False")
        self._begin(grid, device)
        self.num_inference_steps = len(grid)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From t - T // n up to `timestep`, eq. 12 with sigma 0:

            x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps

        What the model says of t is taken for what it would say of the sample's own level, as is usual: the inverse is
        DDIM's to first order.
        """
        stride = self._stride()
        t = self._check_step(model_output, timestep, sample)
        alpha_bar, alpha_bar_next = self._alpha_bar(t - stride), self._alpha_bar(t)

        x0, eps = self._x0_and_eps(model_output, alpha_bar, sample)
        x0 = self._bound(x0)
        next_sample = alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * eps
        return self._leave(next_sample, x0, return_dict)
