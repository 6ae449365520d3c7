"""DDIM: Denoising Diffusion Implicit Models (Song et al., arXiv 2010.02502)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ..config import check_tensors
from ..noise import randn_tensor
from .base import Scheduler, SchedulerConfig, check_number, to_device


@dataclass(frozen=True, eq=False)
class DDIMConfig(SchedulerConfig):
    clip_sample: bool = True
    set_alpha_to_one: bool = True  # whether the last step ends at alpha_bar 1, free of noise, or at timestep 0's
    steps_offset: int = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.require(0 <= self.dynamic_thresholding_ratio <= 1, "dynamic_thresholding_ratio", "lie in 0..1")


class DDIMSchedulerOutput(NamedTuple):
    """The sample at the previous timestep, and the x0 that the model sees in it."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class DDIMScheduler(Scheduler):
    """Deterministic sampling in a few steps; `eta` 1 gives DDPM's noise back."""

    Config = DDIMConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`."""
        self.timesteps = to_device(self._grid(num_inference_steps), device)
        self.num_inference_steps = int(num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to x_{t-1}: eq. 12, with the sigma of eq. 16.

        `eta` 0 is deterministic, 1 is DDPM. `use_clipped_model_output` derives eps anew from the clipped x0.
        `variance_noise` stands in for the noise that is drawn from `generator` where eta > 0.
        """
        stride = self._stride()
        t = self._check_step(model_output, timestep, sample)
        check_number(eta, "eta", least=0)
        alpha_bar = self._alpha_bar(t)
        alpha_bar_prev = self._alpha_bar(t - stride)

        x0, eps = self._x0_and_eps(model_output, alpha_bar, sample)
        x0 = self._bound(x0)
        if use_clipped_model_output:
            eps = (sample - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5

        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
        sigma = eta * variance**0.5
        remaining = 1 - alpha_bar_prev - sigma**2
        if remaining < -1e-6:
            raise ValueError(f"eta={eta} is too large at timestep {t}: it asks for more noise than x_(t-1) has")

        direction_to_x_t = remaining.clamp(min=0) ** 0.5 * eps  # rounding can leave a hair below 0 where eta is 1
        prev_sample = alpha_bar_prev**0.5 * x0 + direction_to_x_t
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("variance_noise and generator exclude each other: pass one")
            if variance_noise is None:
                variance_noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            check_tensors(variance_noise=variance_noise)
            if variance_noise.shape != sample.shape:
                raise ValueError(f"variance_noise has shape {tuple(variance_noise.shape)}, not sample's")
            prev_sample = prev_sample + sigma * variance_noise

        output = DDIMSchedulerOutput(prev_sample, x0)
        return output if return_dict else tuple(output)
