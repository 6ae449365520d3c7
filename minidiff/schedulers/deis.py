"""DEIS: Fast Sampling of Diffusion Models with Exponential Integrator (Zhang and Chen, arXiv 2204.13902)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .base import SchedulerOutput, Spacing
from .solver import SolverConfig, SolverScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class DEISConfig(SolverConfig):
    """The keys of DEISMultistepScheduler."""

    algorithm_type: Literal["deis"] = "deis"
    solver_type: Literal["logrho"] = "logrho"  # the polynomial is one in log(rho), rho = sigma / alpha
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0


DEISConfig.renamed = {
    "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
    "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
}
DEISConfig.fixed = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}


class DEISMultistepScheduler(SolverScheduler):
    """The noise as a polynomial in log(rho) through the last predictions, integrated over rho (section 3.3, tAB)."""

    Config = DEISConfig

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, mu: float | None = None
    ) -> None:
        """Plans `num_inference_steps` steps. `mu` must be None."""
        self._plan(num_inference_steps, device, mu=mu)

    def _last_sigma(self, sigmas: np.ndarray) -> float:
        """A grid that is spaced in sigma stays at its own last level in the last step."""
        return sigmas[-1] if self._spaced_in_sigma() else self.table[0]

    def _clock(self, i: int) -> Tensor:
        alpha, sigma, _ = self._point(i)
        return np.log((sigma / alpha).numpy())

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From s to t, where l_k is 1 at the k-th of the last levels and 0 at the others, a polynomial in log(rho):

        x_t = alpha_t (x_s / alpha_s + sum_k eps_k Int l_k(log(rho)) drho)
        """
        i = self._enter(model_output, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        (alpha_s, sigma_s, _), (alpha, _, _) = self._point(i), self._point(i + 1)
        # The reference divides by the VE reading's sigma, which is flow's own. Without use_flow_sigmas a model of flow
        # isn't right here anyway: right would be sigma_s.
        noise = self.sigmas[i] if self.config.prediction_type == "flow_prediction" else sigma_s
        eps = (x - alpha_s * self._bound(self._x0_at(model_output, x, i))) / noise
        self.history = (*self.history, eps)[-self.config.solver_order :]

        order = self._order(i, len(self.history))
        if order == 1:
            ratio, scale, h = self._interval(i, i + 1, of_noise=True)
            x = ratio * x - scale * (torch.exp(h) - 1) * eps
        else:
            rho = [sigma / alpha for alpha, sigma, _ in map(self._point, range(i + 1, i - order, -1))]
            x = x / alpha_s
            for k, one in zip(range(1, order + 1), reversed(self.history), strict=False):
                others = rho[k + 1 :] + rho[1:k]
                x = x + (antiderivative(rho[0], rho[k], others) - antiderivative(rho[1], rho[k], others)) * one
            x = alpha * x
        return self._leave(x.to(torch.promote_types(sample.dtype, model_output.dtype)), None, return_dict)


def antiderivative(t: Tensor, node: Tensor, others: list[Tensor]) -> Tensor:
    """Of the polynomial in log(rho) that is 1 at `node` and 0 at one or two `others`, at rho = t."""
    # The float32 logarithms of NumPy and torch differ in the last bit, and short steps of order 3 by 1e-5 with them.
    log_t, log_node, *logs = [torch.as_tensor(np.log(one.numpy())) for one in (t, node, *others)]
    if len(logs) == 1:
        (c,) = logs
        return t * (-c + log_t - 1) / (log_node - c)
    c, d = logs
    product = c * (d - log_t + 1) - d * log_t + d + log_t**2 - 2 * log_t + 2
    return t * product / ((log_node - c) * (log_node - d))
