"""DPM-Solver++ for models of EDM's kind (Elucidating the design space, arXiv 2206.00364): Playground 2.5's sampler.

The network F sees c_in x at the timestep log(sigma) / 4, and says x0 = c_skip x + c_out F (the paper's table 1), so
that its input and what it learns have deviation 1 at every level. There are no betas: the reading is VE's, alpha = 1.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..checks import as_integer
from ..loading.config import Range, Share, Width
from .base import Sampler, SamplerConfig
from .dpm_solver import DPMSolverConfig
from .dpm_solver_multistep import DPMSolverMultistepScheduler
from .sigma import SigmaScheduler

Level = Annotated[float, Range(1e-6, 1e6)]


@dataclass(frozen=True, eq=False, kw_only=True)
class EDMDPMSolverMultistepConfig(SamplerConfig):
    """The keys of EDMDPMSolverMultistepScheduler."""

    sigma_min: Level = 0.002
    sigma_max: Level = 80.0
    sigma_data: Level = 0.5  # the deviation of the pictures
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    num_train_timesteps: Width = 1000
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # F, or -F
    rho: Annotated[float, Range(1e-3, 1e3)] = 7.0
    solver_order: Literal[1, 2, 3] = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    renamed = DPMSolverConfig.renamed

    def __post_init__(self):
        super().__post_init__()
        self.require(self.sigma_min < self.sigma_max, "sigma_min", f"be less than sigma_max={self.sigma_max}")
        third = self.algorithm_type == "sde-dpmsolver++" and self.solver_order == 3
        self.require(not third, "solver_order", "be 1 or 2 for the SDE, which has no third here")


class EDMDPMSolverMultistepScheduler(DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` between EDM's levels. `num_train_timesteps` are those of the grid before a run."""

    Config = EDMDPMSolverMultistepConfig
    dtype = "float32"

    def __init__(self, *args, **kwargs):
        Sampler.__init__(self, *args, **kwargs)  # without a schedule of betas
        self._spread(len(self))

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps."""
        n = as_integer(num_inference_steps, "num_inference_steps")
        if n < 1:
            raise ValueError(f"num_inference_steps={n} must be 1 or more")
        self._spread(n, device, self.config.sigma_min if self.config.final_sigmas_type == "sigma_min" else 0.0)
        self.num_inference_steps = n
        self._check_levels()

    def _spread(self, n: int, device: torch.device | str | None = None, last: float = 0.0) -> None:
        """The paper's eq. 5, or levels even in log sigma."""
        c = self.config
        if c.sigma_schedule == "karras":
            most, least = c.sigma_max ** (1 / c.rho), c.sigma_min ** (1 / c.rho)
            sigmas = (most + torch.linspace(0, 1, n) * (least - most)) ** c.rho
        else:
            sigmas = torch.linspace(math.log(c.sigma_min), math.log(c.sigma_max), n).exp().flip(0)
        self._lay((0.25 * sigmas.log()).numpy(), sigmas.numpy(), last, device)

    @property
    def init_noise_sigma(self) -> float:
        return (self.config.sigma_max**2 + 1) ** 0.5  # right would be sigma_data^2 in place of 1

    _reading = SigmaScheduler._reading

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """c_in x = x / sqrt(sigma^2 + sigma_data^2)."""
        return sample / (self.sigmas[self._place(timestep)] ** 2 + self.config.sigma_data**2) ** 0.5

    def _x0_at(self, predicted: Tensor, sample: Tensor, i: int) -> Tensor:
        sigma, data = self.sigmas[i], self.config.sigma_data
        c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
        return c_skip * sample + (c_out if self.config.prediction_type == "epsilon" else -c_out) * predicted
