"""Stochastic sampling of VE models by Heun's method (Elucidating the design space, arXiv 2206.00364, algorithm 2)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_integer
from ..noise import Generators, randn_tensor
from ..outputs import output
from .base import Sampler, SamplerConfig


@dataclass(frozen=True, eq=False)
class KarrasVeConfig(SamplerConfig):
    """The keys of KarrasVeScheduler: the ends of the schedule, and the noise that a step adds first (table 5)."""

    sigma_min: float = 0.02
    sigma_max: float = 100
    s_noise: float = 1.007
    s_churn: float = 80
    s_min: float = 0.05
    s_max: float = 50


@output
class KarrasVeOutput(NamedTuple):
    """The sample at the next level, the slope dx/dsigma of this one, and the x0 that the model sees."""

    prev_sample: Tensor
    derivative: Tensor
    pred_original_sample: Tensor | None = None


class KarrasVeScheduler(Sampler):
    """Each level: `add_noise_to_input`, `step`, and `step_correct` unless the next level is 0.

    `schedule` are the levels by timestep. The model says minus eps.
    """

    Config = KarrasVeConfig
    order = 2
    own_loop = "takes noise levels in place of timesteps, and corrects by step_correct: KarrasVePipeline runs it"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_noise_sigma = self.config.sigma_max
        self.timesteps = self.schedule = None  # until set_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` levels, 2 at least."""
        n = as_integer(num_inference_steps, "num_inference_steps")
        if n < 2:
            raise ValueError(f"num_inference_steps={n} must be 2 or more: the schedule has two ends")
        self._begin(torch.arange(n).flip(0), device)
        self.num_inference_steps = n
        # sigma_max^2 (sigma_min^2 / sigma_max^2)^(i / (n - 1)) is the paper's time (table 1, VE). Right would be its
        # root, the level; the reference takes it for the level itself.
        least, most = self.config.sigma_min**2, self.config.sigma_max**2
        self.schedule = torch.tensor([most * (least / most) ** (i / (n - 1)) for i in self.grid]).to(device)

    def add_noise_to_input(
        self, sample: Tensor, sigma: float | Tensor, generator: Generators = None
    ) -> tuple[Tensor, float | Tensor]:
        """The sample with its noise raised to sigma_hat, where sigma lies in s_min..s_max; and sigma_hat."""
        c, n = self.config, self._planned("add_noise_to_input")
        gamma = min(c.s_churn / n, 2**0.5 - 1) if c.s_min <= sigma <= c.s_max else 0
        noise = c.s_noise * randn_tensor(sample.shape, generator).to(sample.device)
        sigma_hat = sigma + gamma * sigma
        return sample + (sigma_hat**2 - sigma**2) ** 0.5 * noise, sigma_hat

    def step(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple:
        """From sigma_hat to sigma_prev by Euler's step:   x' = x + (sigma' - sigma) (x - x0) / sigma"""
        self._check_tensors(model_output, sample_hat)
        x0 = sample_hat + sigma_hat * model_output
        derivative = (sample_hat - x0) / sigma_hat
        sample_prev = sample_hat + (sigma_prev - sigma_hat) * derivative
        return KarrasVeOutput(sample_prev, derivative, x0) if return_dict else (sample_prev, derivative)

    def step_correct(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        sample_prev: Tensor,
        derivative: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple:
        """The same way by the mean of both ends' slopes. `model_output` is of sample_prev; `derivative` is `step`'s."""
        self._check_tensors(model_output, sample_prev)
        if sigma_prev == 0:
            raise ValueError("sigma_prev is 0, where there is no slope: the last step has no correction")
        x0 = sample_prev + sigma_prev * model_output
        corrected = (sample_prev - x0) / sigma_prev
        sample_prev = sample_hat + (sigma_prev - sigma_hat) * (0.5 * derivative + 0.5 * corrected)
        return KarrasVeOutput(sample_prev, derivative, x0) if return_dict else (sample_prev, derivative)
