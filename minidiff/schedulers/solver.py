"""What DPM-Solver, UniPC and DEIS share: they hold the VP reading, x = alpha x0 + sigma eps, on the grid of sigma.py.

With lambda = log(alpha) - log(sigma), half the log of the signal-to-noise ratio, the exact way from level s to t is

    x_t = sigma_t / sigma_s x_s + alpha_t Int exp(lambda - lambda_t) x0 dlambda    DPM-Solver++, arXiv 2211.01095, eq. 8
    x_t = alpha_t / alpha_s x_s - sigma_t Int exp(lambda_t - lambda) eps dlambda   DPM-Solver, arXiv 2206.00927, eq. 3.4

A solver takes x0 or eps in the integral for a polynomial through the last few predictions, its order their number.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..loading.config import Range, Share
from .base import Scheduler, SchedulerConfig
from .schedule import vp_level
from .sigma import GRIDS, SigmaScheduler, check_one_grid


@dataclass(frozen=True, eq=False, kw_only=True)
class SolverConfig(SchedulerConfig):
    """The keys of all solvers."""

    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    solver_order: Literal[1, 2, 3] = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    use_flow_sigmas: bool | None = False  # x = (1 - sigma) x0 + sigma eps (Flow matching, arXiv 2210.02747)
    flow_shift: Annotated[float, Range(1e-6, 1e6)] = 1.0

    grids_in_flow: ClassVar[tuple[str, ...]] = ()  # grids spaced in sigma that can be read as flow's levels

    def __post_init__(self):
        super().__post_init__()
        check_one_grid(self)
        for key in GRIDS if self.use_flow_sigmas else ():
            self.require(not self.own(key) or key in self.grids_in_flow, key, "be false beside use_flow_sigmas")


class SolverScheduler(SigmaScheduler, abstract=True):
    """The grid in the VP reading. `sigmas` are still those of the VE reading; `_point` gives alpha and sigma."""

    Config = SolverConfig
    spare: ClassVar[int] = 1
    dtype = np.int64  # cut, not rounded, as in the reference
    rounded = True
    init_noise_sigma = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Until set_timesteps the reference has its levels from little noise to much, its timesteps the other way, and
        # add_noise at timestep t then takes the level of T - 1 - t. Right would be the table's own, at t.
        self.sigmas = torch.from_numpy(self.table.copy())

    scale_model_input = Scheduler.scale_model_input  # the model sees what is held

    # The grid

    def _plan(
        self,
        num_inference_steps: int | None,
        device: torch.device | str | None = None,
        timesteps: Any = None,
        mu: float | None = None,
        grid: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Also plans a `grid` of timesteps and sigmas."""
        if mu is not None:
            raise ValueError(f"mu={mu} is for use_dynamic_shifting, which isn't supported: set flow_shift to exp(mu)")
        if grid is None:
            super()._plan(num_inference_steps, device, timesteps)
        else:
            self._lay(*grid, self._last_sigma(grid[1]), device)
            self.num_inference_steps = len(grid[0])
        self._check_levels()

    def _spaced(self, num_inference_steps: int, spare: int = 0, total: int | None = None) -> np.ndarray:
        """Whole timesteps. Those with lambda below `lambda_min_clipped`, nearly all noise, are left out."""
        least, T = self.config.own("lambda_min_clipped", -math.inf), len(self)
        if self._spaced_in_sigma() or least == -math.inf:
            return super()._spaced(num_inference_steps, spare).round()
        lambdas = self.alphas_cumprod.sqrt().log() - (1 - self.alphas_cumprod).sqrt().log()
        total = int((lambdas >= least).sum())
        if total == 0:
            raise ValueError(
                f"lambda_min_clipped={least} leaves no timestep: the largest lambda is {lambdas.max():.3g}"
            )
        if self.config.own("timestep_spacing") == "trailing":  # the stride stays, and so there are fewer steps
            return np.arange(total, 0, -T / len(super()._spaced(num_inference_steps))).round() - 1
        return super()._spaced(num_inference_steps, spare, total).round()

    def _spaced_in_sigma(self) -> bool:
        return any(self.config.own(key) for key in (*GRIDS, "use_flow_sigmas"))

    def _given(self, timesteps: Any) -> np.ndarray:
        return np.trunc(super()._given(timesteps))

    def _ends(self, sigmas: np.ndarray) -> tuple[float, float]:
        return super()._ends(self.table[::-1])

    def _levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.config.use_flow_sigmas:
            return super()._levels(timesteps)
        levels = self._shifted(1 - np.linspace(1, 1 / len(self), len(timesteps) + 1))[::-1][:-1]
        return levels * len(self), levels

    def _shifted(self, levels: np.ndarray) -> np.ndarray:
        """Flow's levels moved towards noise, as larger pictures need (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
        shift = self.config.flow_shift
        return shift * levels / (1 + (shift - 1) * levels)

    def _check_levels(self) -> None:
        """Raises a ValueError where a step would divide by the length of an interval that has none, or is endless."""
        n = len(self.timesteps)
        if self.config.solver_order > 1 and len({float(self._clock(i)) for i in range(n)}) < n:
            raise ValueError(
                f"num_inference_steps={n} asks for equal levels of noise, between which solver_order="
                f"{self.config.solver_order} divides by 0: take fewer steps, or solver_order=1"
            )
        order = self._order(n - 1, n)
        if self._point(n - 1)[2] == self._point(n)[2] and order > self._order_at_rest():
            raise ValueError(
                f"the last step ends where it begins, at sigma {self.sigmas[-1]:.3g}, and order {order} divides by 0: "
                "set final_sigmas_type='zero', or lower_order_final (with fewer than 15 steps), or a lower solver_order"
            )

    def _order(self, i: int, known: int) -> int:
        """The order of the step at place i of the grid, with `known` predictions. The last steps of short runs have a
        lower one, and a step that ends free of noise, at lambda = infinity, has order 1."""
        c, left = self.config, len(self.timesteps) - i
        short = c.lower_order_final and len(self.timesteps) < 15
        if left == 1 and (short or c.own("euler_at_final") or c.own("final_sigmas_type") == "zero"):
            return 1
        return min(c.solver_order, known, 2 if left == 2 and short else 3)

    def _clock(self, i: int) -> Tensor:
        """The variable of the polynomials, at place i of the grid."""
        return self._point(i)[2]

    def _order_at_rest(self) -> int:
        """The highest order at which a last step that ends where it begins still has a number."""
        return 3

    # The readings

    def _reading(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - sigma, sigma) if self.config.use_flow_sigmas else vp_level(sigma)

    def _point(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and lambda at a place in the grid. lambda must be taken in float32, from the float32 sigmas, as
        in the reference: in float64 a step of order 3 differs by 3e-6 at 50 steps, and by 3e-3 at 999."""
        alpha, sigma = self._reading(self.sigmas[i])
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def _x0_at(self, predicted: Tensor, sample: Tensor, i: int) -> Tensor:
        """What the model takes for x0 at a place in the grid."""
        alpha, sigma, _ = self._point(i)
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - sigma * predicted) / alpha
        if kind == "sample":
            return predicted.to(sample.dtype)
        if kind == "v_prediction":
            return alpha * sample - sigma * predicted
        return sample - self.sigmas[i] * predicted  # "flow_prediction": the velocity eps - x0

    def _eps_at(self, predicted: Tensor, sample: Tensor, i: int) -> Tensor:
        """What it takes for the noise."""
        alpha, sigma, _ = self._point(i)
        if self.config.prediction_type == "epsilon":
            return predicted.to(sample.dtype)
        if self.config.prediction_type == "sample":
            return (sample - alpha * predicted) / sigma
        return alpha * predicted + sigma * sample

    def _interval(self, s: int, t: int, of_noise: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The factor of x, that of the integral, and z, the signed length in lambda, from place s to t of the grid.

        With eps in the integral z is h = lambda_t - lambda_s, with x0 it is -h; all else has one form:

            x_t = ratio x_s - scale z (phi_1(z) m + phi_2(z) h m' + phi_3(z) h^2 m'' + ...)
        """
        (alpha_s, sigma_s, lambda_s), (alpha, sigma, lambda_t) = self._point(s), self._point(t)
        h = lambda_t - lambda_s
        return (alpha / alpha_s, sigma, h) if of_noise else (sigma / sigma_s, alpha, -h)
