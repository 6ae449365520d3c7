"""DPM-Solver++ (Lu et al., arXiv 2211.01095, algorithm 2) and its like in dpm_solver.py, as multistep methods."""

import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..noise import Generators, randn_tensor
from .base import SchedulerOutput, Spacing
from .dpm_solver import DPMSolver, DPMSolverConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class DPMSolverMultistepConfig(DPMSolverConfig):
    """The keys of DPMSolverMultistepScheduler."""

    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False  # even in lambda
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        super().__post_init__()
        third = self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3
        self.require(not third, "solver_order", "be 1 or 2 for algorithm_type 'sde-dpmsolver', which has no third")


class DPMSolverMultistepScheduler(DPMSolver):
    """Order 1 to 3 at one model call a step, from the last predictions.

    Order 3 converges as order 2 does: its `h^2 m''` is half of what the formula needs, as in the reference. In float64
    the error against the exact solution falls with the power 2.0 of the steps.
    """

    Config = DPMSolverMultistepConfig

    @property
    def rounded(self) -> bool:
        return self.config.beta_schedule != "squaredcos_cap_v2"

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Plans `num_inference_steps` steps, or the `timesteps`. `mu` must be None."""
        self._plan(num_inference_steps, device, timesteps, mu)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """The formula of `_advance`, with backward differences in lambda for the derivatives.

        `variance_noise` stands in for the noise that the SDEs draw from `generator`.
        """
        i, x = self._take(model_output, timestep, sample)
        noise, sde = variance_noise, self.config.algorithm_type.startswith("sde")
        if noise is not None and not sde:
            warnings.warn(f"variance_noise has no effect: {self.config.algorithm_type} adds none", stacklevel=2)
        if noise is None and sde:
            noise = randn_tensor(x.shape, generator, x.device, torch.float32)
        D = self._differences(i, self._order(i, len(self.history)))
        x = self._advance(x, i, i + 1, D, noise)
        return self._leave(x.to(model_output.dtype), None, return_dict)

    def _differences(self, i: int, order: int) -> list[Tensor]:
        """m, h m', h^2 m'' / 2 at place i: of the parabola through the last three predictions, if there are as many."""
        m, levels = self.history[::-1], [self._point(place)[2] for place in range(i + 1, i - order, -1)]
        h = [after - before for after, before in pairwise(levels)]  # of the step to come, and of those before it
        if order == 1:
            return [m[0]]
        r0 = h[1] / h[0]
        slope = (m[0] - m[1]) / r0
        if order == 2:
            return [m[0], slope]
        r1 = h[2] / h[0]
        bend = (slope - (m[1] - m[2]) / r1) / (r0 + r1)
        return [m[0], slope + r0 * bend, bend]

    def _order_at_rest(self) -> int:
        return 2 if self.config.solver_type == "midpoint" else 1
