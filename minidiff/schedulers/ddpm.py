"""DDPM: Denoising Diffusion Probabilistic Models (Ho et al., arXiv 2006.11239)."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_tensors
from ..loading.config import Share
from ..noise import Generators, randn_tensor
from .base import Scheduler, SchedulerConfig, Spacing, StepOutput


@dataclass(frozen=True, eq=False)
class DDPMConfig(SchedulerConfig):
    """The keys of DDPMScheduler."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear"
    _: KW_ONLY
    variance_type: (  # null comes from DPM-Solver's files, and is read as fixed_small
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ) = "fixed_small"
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False


class DDPMScheduler(Scheduler):
    """Ancestral sampling: each step draws from the posterior of the one before, for the x0 that the model sees."""

    Config = DDPMConfig

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
            grid = self._spaced(num_inference_steps).round().astype("int64").tolist()
        else:
            grid = self._listed(timesteps)
        self._check_signal(grid)
        self._check_noise(grid)
        self._begin(grid, device)
        self.num_inference_steps = len(grid)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to x_{t-1}: the mean of eq. 7 for the x0 of eq. 15, and noise at every timestep but 0:

            x_{t-1} = sqrt(alpha_bar') beta / (1 - alpha_bar) x0 + sqrt(alpha) (1 - alpha_bar') / (1 - alpha_bar) x_t
                      + sigma noise

        With a learned variance `model_output` is (B, 2C, H, W): the prediction, then the variance.
        """
        model_output, predicted_variance = self._split(model_output, sample)
        t = self._check_step(model_output, timestep, sample)

        alpha_bar = self._alpha_bar(t)
        alpha_bar_prev = self._alpha_bar(int(self.previous_timestep(t)))
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

        return self._leave(prev_sample, x0, return_dict)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the model predicts, and its variance where that is learned."""
        check_tensors(model_output=model_output, sample=sample)
        if self.config.variance_type not in ("learned", "learned_range"):
            return model_output, None
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"model_output has {model_output.shape[1]} channels, but variance_type={self.config.variance_type!r}"
                f" needs {2 * sample.shape[1]}: the prediction and its variance"
            )
        return model_output.chunk(2, dim=1)

    def _sigma(self, beta: Tensor, beta_tilde: Tensor, predicted_variance: Tensor | None) -> Tensor:
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
