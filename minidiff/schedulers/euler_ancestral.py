"""Euler's method with fresh noise in each step: DDPM's sampling in the noise level (arXiv 2206.00364, appendix C.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise import Generators, randn_tensor
from .base import StepOutput
from .sigma import SigmaConfig, SigmaScheduler, ancestral


@dataclass(frozen=True, eq=False, kw_only=True)
class EulerAncestralDiscreteConfig(SigmaConfig):
    """The keys of EulerAncestralDiscreteScheduler."""

    rescale_betas_zero_snr: bool = False


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Goes below the next level along the slope, and back up to it by noise. More steps draw another picture."""

    Config = EulerAncestralDiscreteConfig

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`."""
        self._plan(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma to sigma', by way of sigma_down:

            x' = x + (sigma_down - sigma) (x - x0) / sigma + sigma_up noise
            sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2,  sigma_down^2 = sigma'^2 - sigma_up^2

        The last step, to 0, draws noise too, and gives it no weight.
        """
        i = self._enter(model_output, timestep, sample)
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))

        x0 = self._x0(model_output, x, sigma)
        sigma_up, sigma_down = ancestral(sigma, sigma_next)
        slope = (x - x0) / sigma
        noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        x = x + slope * (sigma_down - sigma) + noise * sigma_up
        return self._leave(x.to(model_output.dtype), x0, return_dict)
