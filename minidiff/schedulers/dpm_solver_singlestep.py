"""DPM-Solver (Lu et al., arXiv 2206.00927, algorithms 1 and 2) and its like in dpm_solver.py, as singlestep methods."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..noise import Generators, randn_tensor
from .base import SchedulerOutput
from .dpm_solver import DPMSolver, DPMSolverConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class DPMSolverSinglestepConfig(DPMSolverConfig):
    """The keys of DPMSolverSinglestepScheduler."""

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    lower_order_final: bool = False

    def __post_init__(self):
        super().__post_init__()
        bounded = self.thresholding and self.algorithm_type == "dpmsolver"
        self.require(not bounded, "thresholding", "be false for algorithm_type 'dpmsolver': take 'dpmsolver++'")


class DPMSolverSinglestepScheduler(DPMSolver):
    """Order p in intervals of p model calls each, which need none of the past: orders 1, 2, ..., p, all from the start.

    In float64 the error against the exact solution falls with the power p of the steps (measured from 84 to 168: 1.00
    to 1.01, 1.97 to 2.02, 2.94 to 3.02). The SDE's noises are new ones in each call, and its variance converges with
    the first power alone; that of order 3 with `heun` doesn't converge, for the weight in `_advance`.
    """

    Config = DPMSolverSinglestepConfig
    rounded = True

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Plans `num_inference_steps` model calls, or the `timesteps`. `mu` must be None."""
        self._plan(num_inference_steps, device, timesteps, mu)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """The formula of `_advance`, from where the interval begins, with forward differences for the derivatives."""
        i, x = self._take(model_output, timestep, sample)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        order = self._order(i, len(self.history))
        if order == 1:
            self.start = x
        sde = self.config.algorithm_type.startswith("sde")
        noise = randn_tensor(x.shape, generator, x.device, dtype) if sde else None
        x = self._advance(self.start, self._begins(i, order), i + 1, self._differences(i, order), noise)
        return self._leave(x.to(dtype), None, return_dict)

    def _order(self, i: int, known: int) -> int:
        """1, 2, ..., p, and again; the last step has order 1 where it ends free of noise, or the config says so.

        A number of steps that p doesn't divide leaves the last interval short. The reference then sets the config's own
        lower_order_final, also for later runs; here each run is planned alone.
        """
        c, p = self.config, self.config.solver_order
        whole = len(self.timesteps) % p == 0
        if i + 1 == len(self.timesteps) and (c.final_sigmas_type == "zero" or (c.lower_order_final and whole)):
            return 1
        return min(i % p + 1, known)

    def _begins(self, i: int, order: int) -> int:
        return i + 1 - order

    def _differences(self, i: int, order: int) -> list[Tensor]:
        """m, h m', h^2 m'' where the interval begins, h its length: of the parabola through its three predictions.

        Of three `midpoint` takes the chord from the first to the last, which at 2/3 of h makes up for the m'' left out.
        """
        m, levels = self.history[-order:], [self._point(place)[2] for place in range(i + 1 - order, i + 2)]
        r = [(level - levels[0]) / (levels[-1] - levels[0]) for level in levels[1:-1]]
        chords = [(later - m[0]) / r_k for later, r_k in zip(m[1:], r, strict=True)]
        if order < 3:
            return [m[0], *chords]
        near, far = chords
        if self.config.solver_type == "midpoint":
            return [m[0], far, torch.zeros_like(far)]
        return [m[0], (r[1] * near - r[0] * far) / (r[1] - r[0]), 2 * (far - near) / (r[1] - r[0])]
