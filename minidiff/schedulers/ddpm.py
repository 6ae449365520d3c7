"""DDPM: Denoising Diffusion Probabilistic Models (Ho et al., arXiv 2006.11239)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from ..config import check_tensors
from ..noise import randn_tensor
from .base import Scheduler, SchedulerConfig, as_integer, to_device


@dataclass(frozen=True, eq=False)
class DDPMConfig(SchedulerConfig):
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    variance_type: (  # null comes from DPM-Solver's files, and is read as fixed_small
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ) = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.require(0 <= self.dynamic_thresholding_ratio <= 1, "dynamic_thresholding_ratio", "lie in 0..1")


class DDPMSchedulerOutput(NamedTuple):
    """The sample at the previous timestep, and the x0 that the model sees in it."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class DDPMScheduler(Scheduler):
    """Ancestral sampling: each step draws from the posterior of the one before, for the x0 that the model sees."""

    Config = DDPMConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._previous: dict[int, int] = {}  # timestep -> the one after it in the run; empty before set_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`, or the descending `timesteps`."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass either num_inference_steps or timesteps")
        if timesteps is None:
            grid = self._grid(num_inference_steps).tolist()
        else:
            grid = [as_integer(t, "timesteps") for t in timesteps]
            if not grid or any(t <= t_next for t, t_next in pairwise(grid)):
                raise ValueError(f"timesteps={grid} must be in descending order, and at least one")
            if grid[0] >= len(self) or grid[-1] < 0:
                raise ValueError(f"timesteps={grid} must lie in 0..{len(self) - 1}")
        self.timesteps = to_device(grid, device)
        self.num_inference_steps = None if num_inference_steps is None else int(num_inference_steps)
        self._previous = dict(zip(grid, [*grid[1:], -1], strict=True))

    def previous_timestep(self, timestep: int | torch.Tensor) -> int:
        """The timestep that a step from `timestep` leads to; -1 after the last."""
        t = as_integer(timestep, "timestep")
        if self._previous and t not in self._previous:
            raise ValueError(f"timestep={t} is none of those that set_timesteps planned")
        return self._previous.get(t, t - 1)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to x_{t-1}: the mean of eq. 7 for the x0 of eq. 15, and noise at every timestep but 0.

        With a learned variance `model_output` is (B, 2C, H, W): the prediction, then the variance.
        """
        check_tensors(model_output=model_output, sample=sample)
        predicted_variance = None
        if self.config.variance_type in ("learned", "learned_range"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(
                    f"model_output has {model_output.shape[1]} channels, but variance_type="
                    f"{self.config.variance_type!r} needs {2 * sample.shape[1]}: the prediction and its variance"
                )
            model_output, predicted_variance = model_output.chunk(2, dim=1)
        t = self._check_step(model_output, timestep, sample)

        alpha_bar = self._alpha_bar(t)
        alpha_bar_prev = self._alpha_bar(self.previous_timestep(t))
        alpha = alpha_bar / alpha_bar_prev  # of the whole step, which may span several timesteps
        beta = 1 - alpha

        x0, _ = self._x0_and_eps(model_output, alpha_bar, sample)
        x0 = self._bound(x0)
        x0_weight = alpha_bar_prev**0.5 * beta / (1 - alpha_bar)
        sample_weight = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
        prev_sample = x0_weight * x0 + sample_weight * sample
        if t > 0:
            sigma = self._sigma(beta, (1 - alpha_bar_prev) / (1 - alpha_bar) * beta, predicted_variance)
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + sigma * noise

        output = DDPMSchedulerOutput(prev_sample, x0)
        return output if return_dict else tuple(output)

    def _sigma(
        self, beta: torch.Tensor, beta_tilde: torch.Tensor, predicted_variance: torch.Tensor | None
    ) -> torch.Tensor:
        """The standard deviation of a step's noise. Its variance lies between beta_tilde (eq. 7) and beta."""
        variance_type = self.config.variance_type
        beta_tilde = beta_tilde.clamp(min=1e-20)  # 0 where a step ends free of noise, and has no logarithm
        if variance_type == "fixed_large":
            return beta**0.5
        if variance_type == "fixed_large_log":
            raise ValueError("variance_type='fixed_large_log' is the root of a negative logarithm; use 'fixed_large'")
        if variance_type == "fixed_small_log":
            return torch.exp(0.5 * beta_tilde.log())
        if variance_type == "learned":
            return predicted_variance**0.5
        if variance_type == "learned_range":  # Improved DDPM (arXiv 2102.09672), eq. 15, from [-1, 1]
            share = (predicted_variance + 1) / 2
            return torch.exp(0.5 * (share * beta.log() + (1 - share) * beta_tilde.log()))
        return beta_tilde**0.5
