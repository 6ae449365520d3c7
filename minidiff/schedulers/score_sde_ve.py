"""The reverse SDE of VE models, predicted and corrected (Score-based generative modeling, arXiv 2011.13456)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..loading.config import Width
from ..noise import Generators, randn_tensor
from ..outputs import output
from .base import Sampler, SamplerConfig, SchedulerOutput


@dataclass(frozen=True, eq=False)
class ScoreSdeVeConfig(SamplerConfig):
    """The keys of ScoreSdeVeScheduler."""

    num_train_timesteps: Width = 2000
    snr: float = 0.15  # the length of a corrector's step, as a ratio of its two parts
    sigma_min: float = 0.01
    sigma_max: float = 1348.0
    sampling_eps: float = 1e-5  # the time at which a run ends, in 0..1
    correct_steps: int = 1  # how often the pipeline corrects at each level

    def __post_init__(self):
        super().__post_init__()
        self.require(self.sigma_min > 0, "sigma_min", "be more than 0: the levels are spaced in its logarithm")


@output
class SdeVeOutput(NamedTuple):
    """The sample at the next lower level, and the same before its noise: what a run's last step ends with."""

    prev_sample: Tensor
    prev_sample_mean: Tensor


class ScoreSdeVeScheduler(Sampler):
    """Each level: `step_correct` some times, then `step_pred`. The model says the score, minus eps / sigma.

    `timesteps` are times, from 1 to `sampling_eps`; `sigmas` their levels, `discrete_sigmas` the levels in ascending
    order, between which `step_pred` moves.
    """

    Config = ScoreSdeVeConfig
    own_loop = "has step_pred and step_correct in place of step: ScoreSdeVePipeline runs it"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.init_noise_sigma = self.config.sigma_max
        self.timesteps = None
        self.set_sigmas(len(self))

    def set_timesteps(
        self,
        num_inference_steps: int,
        sampling_eps: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Plans `num_inference_steps` times, from 1 to `sampling_eps` (else the config's). `set_sigmas` comes next."""
        end = self.config.sampling_eps if sampling_eps is None else sampling_eps
        self._begin(torch.linspace(1, end, as_integer(num_inference_steps, "num_inference_steps")), device)

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """The levels of as many times; each end is the config's if None."""
        least = self.config.sigma_min if sigma_min is None else sigma_min
        most = self.config.sigma_max if sigma_max is None else sigma_max
        if self.timesteps is None:
            self.set_timesteps(num_inference_steps, sampling_eps)
        self.sigmas = torch.tensor([least * (most / least) ** t for t in self.grid])
        steps = as_integer(num_inference_steps, "num_inference_steps")
        self.discrete_sigmas = torch.linspace(math.log(least), math.log(most), steps).exp()

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple:  # model_output, sample: (B, C, H, W); timestep: a time, or (B,) of them
        """From sigma to sigma', the next lower level, by reverse diffusion, algorithm 2:

        x' = x + (sigma^2 - sigma'^2) score + sqrt(sigma^2 - sigma'^2) noise
        """
        self._check_tensors(model_output, sample)
        i = (torch.as_tensor(timestep).float().cpu() * (len(self.grid) - 1)).long().expand(len(sample))
        if i.max() >= len(self.discrete_sigmas):
            n = len(self.grid)
            raise ValueError(
                f"set_timesteps planned {n} steps, set_sigmas {len(self.discrete_sigmas)}: call set_sigmas({n})"
            )
        levels = torch.cat([torch.zeros(1), self.discrete_sigmas])
        sigma, sigma_next = levels[i + 1], levels[i]
        diffusion = ((sigma**2 - sigma_next**2) ** 0.5).to(sample.device).view(-1, *[1] * (sample.ndim - 1))

        mean = sample + diffusion**2 * model_output
        noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        result = SdeVeOutput(mean + diffusion * noise, mean)
        return result if return_dict else tuple(result)

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """Langevin's step at the same level, algorithm 4:

        x' = x + e score + sqrt(2 e) noise,   e = 2 (snr |noise| / |score|)^2, with the batch's mean norms
        """
        self._check_tensors(model_output, sample)
        noise = randn_tensor(sample.shape, generator).to(sample.device)
        score_norm, noise_norm = (x.flatten(1).norm(dim=-1).mean() for x in (model_output, noise))
        e = ((self.config.snr * noise_norm / score_norm) ** 2 * 2).view([1] * sample.ndim)
        result = SchedulerOutput(sample + e * model_output + (2 * e) ** 0.5 * noise)
        return result if return_dict else tuple(result)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """x0 + sigma noise, at places (B,) of `discrete_sigmas`; noise is drawn if None."""
        check_tensors(original_samples=original_samples, timesteps=timesteps)
        noise = torch.randn_like(original_samples) if noise is None else noise
        sigma = self.discrete_sigmas[timesteps.cpu()].to(original_samples.device)
        return original_samples + sigma.view(-1, *[1] * (original_samples.ndim - 1)) * noise
