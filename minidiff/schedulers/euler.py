"""Euler's method in the noise level (Elucidating the design space of diffusion-based models, arXiv 2206.00364)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..noise import Generators, randn_tensor
from .base import StepOutput
from .sigma import KarrasConfig, SigmaScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class EulerDiscreteConfig(KarrasConfig):
    """The keys of EulerDiscreteScheduler."""

    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None  # the ends of the grids that are spaced in sigma
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


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
        self._plan(num_inference_steps, device, timesteps, sigmas)

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
