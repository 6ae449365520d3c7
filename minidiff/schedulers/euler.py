"""Euler's method in the noise level (Elucidating the design space of diffusion-based models, arXiv 2206.00364)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import check_number
from ..loading.config import Range
from ..noise import Generators, randn_tensor
from .base import Scheduler, StepOutput
from .sigma import KarrasConfig, SigmaScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class EulerDiscreteConfig(KarrasConfig):
    """The keys of EulerDiscreteScheduler."""

    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: Annotated[float, Range(1e-6, 1e6)] | None = None  # the ends of the grids that are spaced in sigma
    sigma_max: Annotated[float, Range(1e-6, 1e6)] | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"  # of v_prediction: log(sigma) / 4, as EDM's models
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self):
        super().__post_init__()
        ordered = None in (self.sigma_min, self.sigma_max) or self.sigma_min < self.sigma_max
        self.require(ordered, "sigma_min", f"be less than sigma_max={self.sigma_max}")


class EulerDiscreteScheduler(SigmaScheduler):
    """Algorithm 2 of the paper, without its second order: one slope an interval. `s_churn` > 0 makes it stochastic."""

    Config = EulerDiscreteConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Plans `num_inference_steps` steps, or the `timesteps`, or the `sigmas` (the last one is where it ends)."""
        if timesteps is not None and self._is_continuous():
            raise ValueError("timesteps was given, but timestep_type='continuous' derives them: pass sigmas instead")
        self._plan(num_inference_steps, device, timesteps, sigmas)

    def _is_continuous(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def _lay(self, timesteps: np.ndarray, sigmas: np.ndarray, last: float, device: str | None = None) -> None:
        if self._is_continuous():
            timesteps = 0.25 * torch.from_numpy(sigmas.astype(np.float32)).log().numpy()
        super()._lay(timesteps, sigmas, last, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma to sigma', along the slope at sigma:

            x' = x + (sigma' - sigma) (x - x0) / sigma

        Where `s_tmin` <= sigma <= `s_tmax`, `s_churn` first adds noise, of deviation `s_noise`, up to sigma_hat.
        """
        i = self._enter(model_output, timestep, sample)
        check_number(s_churn, "s_churn", least=0)
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))

        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + noise * s_noise * (sigma_hat**2 - sigma**2) ** 0.5

        x0 = self._x0(model_output, x, sigma, sigma_hat)
        slope = (x - x0) / sigma_hat
        x = x + slope * (sigma_next - sigma_hat)
        return self._leave(x.to(model_output.dtype), x0, return_dict)

    def _vp_levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For `get_velocity`. Right would be the level at the timestep's place in the grid, as other samplers have it.
        The reference looks that place up in the table of alpha_bar, which runs the other way: from no noise to much."""
        return Scheduler._levels_at(self, torch.tensor([self.index_for_timestep(t) for t in timesteps]), dtype)
