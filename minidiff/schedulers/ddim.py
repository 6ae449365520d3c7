"""DDIM: Denoising Diffusion Implicit Models (Song et al., arXiv 2010.02502)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_number, check_tensors
from ..loading.config import Share
from ..noise import Generators, randn_tensor
from .base import Scheduler, SchedulerConfig, Spacing, StepOutput


@dataclass(frozen=True, eq=False, kw_only=True)
class DDIMConfig(SchedulerConfig):
    """The keys of DDIMScheduler."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True  # whether the last step ends at alpha_bar 1, free of noise, or at timestep 0's
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False


class DDIMScheduler(Scheduler):
    """Deterministic sampling in a few steps; `eta` 1 gives DDPM's noise back."""

    Config = DDIMConfig

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`."""
        grid = self._spaced(num_inference_steps).round().astype("int64")
        self._check_signal(grid)
        self._check_noise(grid)
        self._begin(grid, device)
        self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to x_{t-1}, eq. 12, with the sigma of eq. 16:

            x_{t-1} = sqrt(alpha_bar') x0 + sqrt(1 - alpha_bar' - sigma^2) eps + sigma noise

        `eta` 0 is deterministic, 1 is DDPM. `use_clipped_model_output` derives eps anew from the clipped x0.
        `variance_noise` stands in for the noise that is drawn from `generator` where eta > 0.
        """
        stride = self._stride()  # T // n, not the grid's own: see there
        t = self._check_step(model_output, timestep, sample)
        check_number(eta, "eta", least=0)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t - stride)

        x0, eps = self._x0_and_eps(model_output, alpha_bar, sample)
        x0 = self._bound(x0)
        if use_clipped_model_output:
            eps = (sample - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5

        sigma, remaining = share_noise(eta, t, alpha_bar, alpha_bar_prev)
        prev_sample = alpha_bar_prev**0.5 * x0 + remaining**0.5 * eps
        if eta > 0:
            prev_sample = prev_sample + sigma * _noise(model_output, generator, variance_noise)
        return self._leave(prev_sample, x0, return_dict)


def share_noise(eta: float, t: int, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """sigma, eq. 16: the deviation of a step's new noise; and the variance that remains for eps."""
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * variance**0.5
    remaining = 1 - alpha_bar_prev - sigma**2
    if remaining < -1e-6:
        raise ValueError(f"eta={eta} is too large at timestep {t}: it asks for more noise than x_(t-1) has")
    return sigma, remaining.clamp(min=0)  # rounding can leave a hair below 0 where eta is 1


def _noise(like: Tensor, generator: Generators, given: Tensor | None) -> Tensor:
    """Fresh noise, or the `given` one, which must fit."""
    if given is None:
        return randn_tensor(like.shape, generator, like.device, like.dtype)
    if generator is not None:
        raise ValueError("variance_noise and generator exclude each other: pass one")
    check_tensors(variance_noise=given)
    if given.shape != like.shape:
        raise ValueError(f"variance_noise has shape {tuple(given.shape)}, not sample's")
    return given
