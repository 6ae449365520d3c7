"""Euler's method on straight paths: Flow Matching (Lipman et al., arXiv 2210.02747), Rectified Flow (arXiv 2209.03003).

A sample is (1 - sigma) x0 + sigma eps, with sigma in 0..1, and the model says the velocity eps - x0.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..loading.config import Share, Width
from ..noise import Generators, randn_tensor
from .base import Sampler, SamplerConfig, SchedulerOutput
from .sigma import check_one_grid, spaced_in_sigma


@dataclass(frozen=True, eq=False)
class FlowMatchEulerDiscreteConfig(SamplerConfig):
    """The keys of FlowMatchEulerDiscreteScheduler."""

    num_train_timesteps: Width = 1000
    shift: float = 1.0  # more than 1: more steps at much noise, as large pictures need (SD3, arXiv 2403.03206, eq. 23)
    use_dynamic_shifting: bool = False  # by the `mu` of set_timesteps instead
    base_shift: float | None = 0.5  # this and the next three are the pipelines', who compute mu from them
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False  # the grid ascends to 1, for models that count so
    shift_terminal: Share | None = None  # where the last step begins, to which the grid is stretched
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_one_grid(self)
        self.require(self.shift_terminal != 1, "shift_terminal", "be less than 1, where the grid begins")


class FlowMatchEulerDiscreteScheduler(Sampler):
    """`sigmas` are the levels of the run, one more than steps, float32, on the CPU; `timesteps` are 1000 times them."""

    Config = FlowMatchEulerDiscreteConfig
    own_loop = "needs a model that says a flow's velocity, as SD3's and Flux's do"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        c = self.config
        self.shift = c.shift
        self.sigmas = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        if not c.use_dynamic_shifting:
            self.sigmas = shifted(self.sigmas, self.shift)
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()
        self._begin(self.sigmas * len(self))

    def set_shift(self, shift: float) -> None:
        """Another `shift` than the config's, for the runs to come."""
        self.shift = shift

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Plans `num_inference_steps` steps, or the levels `sigmas`, which are shifted all the same, without the last.

        `timesteps` are what the model is told; alone, they say the levels too. `mu`: how far to shift, where
        `use_dynamic_shifting` asks for it.
        """
        n = self._count(num_inference_steps=num_inference_steps, sigmas=sigmas, timesteps=timesteps)
        c, T = self.config, len(self)
        given = None if timesteps is None else np.array(timesteps, dtype=np.float32)
        if sigmas is not None:
            levels = np.array(sigmas, dtype=np.float32)
        else:
            # The ends are the table's, which is shifted already, so that the last level is shifted twice. Right would
            # be once.
            levels = (np.linspace(self.sigma_max * T, self.sigma_min * T, n) if given is None else given) / T
        if not c.use_dynamic_shifting:
            levels = shifted(levels, self.shift)
        elif mu is None:
            raise ValueError("mu is None: use_dynamic_shifting needs it, from the picture's size")
        else:
            levels = self.time_shift(mu, 1.0, levels)
        if c.shift_terminal:
            levels = self._stretched(levels)
        spaced = spaced_in_sigma(c, levels[0].item(), levels[-1].item(), n)
        run = torch.from_numpy(levels if spaced is None else spaced).float()
        if not run.isfinite().all():
            raise ValueError(f"the levels {run.tolist()} aren't all finite: take other sigmas, or another mu")
        run = 1 - run if c.invert_sigmas else run
        self.sigmas = torch.cat([run, torch.ones(1) if c.invert_sigmas else torch.zeros(1)])
        self._begin(torch.from_numpy(given) if given is not None and not c.invert_sigmas else run * T, device)
        self.num_inference_steps = n

    def time_shift(self, mu: float, sigma: float, t: np.ndarray) -> np.ndarray:
        """Levels shifted by `mu` (SD3, section 5.3.2); `sigma` is an exponent of the odds."""
        factor = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        return factor / (factor + (1 / t - 1) ** sigma)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 - sigma) x0 + sigma eps. `timestep` (B,) are the grid's own; `set_begin_index` goes before them."""
        check_tensors(sample=sample, timestep=timestep, noise=noise)
        sigma = self.sigmas[self._places(timestep)].view(-1, *[1] * (sample.ndim - 1))
        keep, add = (x.to(sample.device, sample.dtype) for x in (1 - sigma, sigma))
        return add * noise + keep * sample

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, ...)
        """From sigma to sigma', straight on; or, `stochastic_sampling`, by the path's end and new noise:

            x' = x + (sigma' - sigma) velocity            x' = (1 - sigma') (x - sigma velocity) + sigma' noise

        `per_token_timesteps` (B, N) are levels times 1000 of each token; every one goes to the next level of the grid.
        """
        _check_arguments(timestep, s_churn)
        i = self._enter(model_output, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if per_token_timesteps is None:
            sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
            dt, dtype = sigma_next - sigma, model_output.dtype
        else:
            sigma = (per_token_timesteps / len(self))[..., None]  # (B, N, 1)
            levels = self.sigmas.to(sigma.device).view(-1, 1, 1, 1)
            sigma_next = (levels * (levels < sigma - 1e-6)).amax(0)
            dt, dtype = sigma - sigma_next, x.dtype  # right would be minus that: pipelines hand in minus the velocity
        if self.config.stochastic_sampling:
            noise = randn_tensor(x.shape, generator, x.device, x.dtype)
            x = (1 - sigma_next) * (x - sigma * model_output) + sigma_next * noise
        else:
            x = x + dt * model_output
        return self._leave(x.to(dtype), None, return_dict)

    def _stretched(self, levels: np.ndarray) -> np.ndarray:
        """Levels whose distance from 1 is scaled, so that the last one is `shift_terminal`."""
        distance = 1 - levels
        if distance[-1] == 0:
            raise ValueError(
                f"the last of {len(levels)} levels is 1, and can't be stretched to shift_terminal: take more"
            )
        return 1 - distance / (distance[-1] / (1 - self.config.shift_terminal))

    def _count(self, **given: Sequence[float] | int | None) -> int:
        """How many steps are asked for, in all the ways that they are."""
        steps = given.pop("num_inference_steps")
        counts = {name: len(values) for name, values in given.items() if values is not None}
        if steps is not None:
            counts["num_inference_steps"] = as_integer(steps, "num_inference_steps")
        if len({*counts.values()}) != 1 or min(counts.values()) < 1:
            raise ValueError(
                f"num_inference_steps, sigmas and timesteps must say one number of steps, but say {counts}"
            )
        return next(iter(counts.values()))


def shifted(sigma: np.ndarray | Tensor, shift: float) -> np.ndarray | Tensor:
    """The level of as much signal in a picture of shift^2 times the pixels (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _check_arguments(timestep: float | Tensor, s_churn: float) -> None:
    whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
    if whole:
        raise ValueError(f"timestep={timestep} is a whole number: pass one of the scheduler's timesteps, not its place")
    if s_churn:
        warnings.warn("s_churn has no effect: noise is added by stochastic_sampling", stacklevel=3)
