"""UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (arXiv 2302.04867)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .base import SchedulerOutput, Spacing
from .sigma import descending, karras
from .solver import SolverConfig, SolverScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class UniPCConfig(SolverConfig):
    """The keys of UniPCMultistepScheduler."""

    predict_x0: bool = True  # whether x0 stands in the integral, or the noise, which thresholding then leaves alone
    solver_type: Literal["bh1", "bh2"] = "bh2"  # B(h) of the paper: h, or e^h - 1
    disable_corrector: tuple[int, ...] = ()  # the steps whose result the next prediction doesn't correct
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None  # the ends of the grids that are spaced in sigma
    sigma_max: float | None = None
    shift_terminal: float | None = None  # where the grid of flow's levels ends

    def __post_init__(self):
        super().__post_init__()
        flow = self.predict_x0 or self.prediction_type != "flow_prediction"
        self.require(flow, "prediction_type", "be another where predict_x0 is false")
        flow = self.shift_terminal is None or self.use_flow_sigmas
        self.require(flow, "shift_terminal", "be null, or use_flow_sigmas be true")


UniPCConfig.renamed = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}
UniPCConfig.grids_in_flow = ("use_karras_sigmas",)
UniPCConfig.fixed = {"solver_p": None, "use_dynamic_shifting": False, "time_shift_type": "exponential"}


class UniPCMultistepScheduler(SolverScheduler):
    """A predictor of order p, which the next prediction then corrects to order p + 1, at no model call more.

    In float64 the error against the exact solution falls with the power p + 1 of the steps (measured from 80 to 160:
    1.94 to 2.04, 2.96 to 3.02, 3.94 to 4.13), and without the corrector with p. That needs p exact predictions to begin
    with. In a run p = 3 falls with the power 3 in the end, for the first step's order is 1, and its error h^3.
    """

    Config = UniPCConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plans `num_inference_steps` steps, or flow's `sigmas`, before they are shifted. `mu` must be None."""
        if sigmas is None:
            self._plan(num_inference_steps, device, mu=mu)
            return
        if not self.config.use_flow_sigmas or self.config.use_karras_sigmas:
            raise ValueError("sigmas was given: it needs use_flow_sigmas, and no use_karras_sigmas")
        if num_inference_steps not in (None, len(sigmas)):
            raise ValueError(f"num_inference_steps={num_inference_steps}, but {len(sigmas)} sigmas were given")
        grid = self._in_flow(descending(sigmas, "sigmas", least=1e-6))
        self._plan(None, device, mu=mu, grid=grid)

    def _levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, T = len(timesteps), len(self)
        if not self.config.use_flow_sigmas:
            return super()._levels(timesteps)
        if self.config.use_karras_sigmas:
            levels = karras(*self._ends(self.table), n)
            levels = levels / (levels + 1)
            return levels * T, levels
        return self._in_flow(np.linspace(1, 1 / T, n + 1)[:-1])

    def _in_flow(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and levels, shifted, and stretched to end at `shift_terminal`."""
        levels = self._shifted(levels)
        if self.config.shift_terminal:
            if levels[-1] == 1:
                raise ValueError(
                    f"shift_terminal needs more than one level, and the last below 1, but there is {levels}"
                )
            levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - self.config.shift_terminal))
        if abs(levels[0] - 1) < 1e-6:  # all noise, where lambda would be -infinity
            levels[0] -= 1e-6
        return levels * len(self), levels

    def _last_sigma(self, sigmas: np.ndarray) -> float:
        """`sigma_min` is a spaced grid's own last level: the last step then stays where it is."""
        own = self._spaced_in_sigma() and self.config.final_sigmas_type == "sigma_min"
        return sigmas[-1] if own else super()._last_sigma(sigmas)

    def _order(self, i: int, known: int) -> int:
        c, left = self.config, len(self.timesteps) - i
        return min(c.solver_order, known, left if c.lower_order_final else 3)

    def _order_at_rest(self) -> int:
        return 2

    def _check_levels(self) -> None:
        super()._check_levels()
        c, n = self.config, len(self.timesteps)
        infinite = not c.predict_x0 or c.solver_type == "bh1" or self._order(n - 1, n) > 1
        if self.sigmas[-1] == 0 and infinite:
            raise ValueError(
                "the last step ends free of noise, at lambda = infinity, which needs predict_x0, solver_type='bh2' and "
                "lower_order_final (or solver_order=1): set these, or final_sigmas_type='sigma_min'"
            )

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """First the interval that led here, once more, with what the model says at its end (UniC); then the next one,
        from there (UniP). The model isn't called again at the corrected sample."""
        i = self._enter(model_output, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        x0 = self.config.predict_x0
        m = self._bound(self._x0_at(model_output, x, i)) if x0 else self._eps_at(model_output, x, i)

        if self.history and i - 1 not in self.config.disable_corrector:
            x = self._advance(*self.before, i, at_end=m)
        self.history = (*self.history, m)[-self.config.solver_order :]
        self.before = x, self._order(i, len(self.history))
        x = self._advance(*self.before, i + 1)
        return self._leave(x.to(sample.dtype), None, return_dict)

    def _advance(self, x: Tensor, order: int, t: int, at_end: Tensor | None = None) -> Tensor:
        """To place t of the grid from the one before it, s, eq. 3 and 8 with m for x0 or eps and r_k = (lambda_k -
        lambda_s) / h:

            x_t = ratio x_s - scale ((e^z - 1) m_s + B(z) sum_k a_k (m_k - m_s) / r_k)

        over the predictions before s, and with the corrector the one `at_end`, whose r is 1. The weights a solve
        sum_k a_k r_k^(j-1) = j! z phi_(j+1)(z) / B(z) for j = 1, 2, ..., which makes the step exact for polynomials.
        """
        ratio, scale, z = self._interval(t - 1, t, not self.config.predict_x0)
        (_, _, lambda_s), (_, _, lambda_t) = self._point(t - 1), self._point(t)
        h, (m, *past) = lambda_t - lambda_s, self.history[::-1]
        r = [(self._point(t - 1 - k)[2] - lambda_s) / h for k in range(1, order)]
        D = [(one - m) / r_k for one, r_k in zip(past, r, strict=False)]
        if at_end is not None:
            D, r = [*D, at_end - m], [*r, torch.ones_like(h)]

        grown = torch.expm1(z)
        B = z if self.config.solver_type == "bh1" else grown
        x = ratio * x - scale * grown * m
        if not D:
            return x
        if len(D) == 1 and order == (2 if at_end is None else 1):
            weights = torch.full_like(z, 0.5).view(1)  # rather than the solution, equal up to z
        else:
            b, phi, factorial = [], grown / z - 1, 1  # phi: z^j phi_(j+1)
            for j in range(1, len(D) + 1):
                b.append(phi * factorial / B)
                factorial *= j + 1
                phi = phi / z - 1 / factorial
            weights = torch.linalg.solve(torch.stack([torch.stack(r) ** j for j in range(len(D))]), torch.stack(b))
        return x - scale * B * sum(weight * term for weight, term in zip(weights, D, strict=True))
