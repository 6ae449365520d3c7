"""DPM-Solver++ (Lu et al., arXiv 2211.01095), its noise-predicting forerunner (arXiv 2206.00927), and their SDEs.

The formula, which has two users: `dpm_solver_multistep.py` and `dpm_solver_singlestep.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_tensors
from .solver import SolverConfig, SolverScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class DPMSolverConfig(SolverConfig):
    """The keys of both DPM-Solvers. The two algorithms without ++ take the model's noise for smooth, not its x0."""

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | Literal[-math.inf] = -math.inf
    variance_type: Literal["learned", "learned_range"] | None = None  # the model's second half, which isn't used

    def __post_init__(self):
        super().__post_init__()
        kind = self.algorithm_type
        if not kind.endswith("++"):
            self.require(self.final_sigmas_type == "sigma_min", "final_sigmas_type", f"be 'sigma_min' for {kind!r}")
            flow = self.prediction_type == "flow_prediction"
            self.require(not flow, "prediction_type", f"be another for {kind!r}, or the algorithm_type 'dpmsolver++'")


DPMSolverConfig.renamed = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}
DPMSolverConfig.fixed = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}


class DPMSolver(SolverScheduler, abstract=True):
    """The formula of both DPM-Solvers, which differ in where a step begins, and the past predictions lie."""

    Config = DPMSolverConfig

    def _take(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> tuple[int, Tensor]:
        """The place of the step, and the sample in float32 or more, once the history has what the model says."""
        predicted = self._split(model_output, sample)
        i = self._enter(predicted, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        self.history = (*self.history, self._read(predicted, x, i))[-self.config.solver_order :]
        return i, x

    def _split(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the model predicts, without the variance where it has learned one."""
        check_tensors(model_output=model_output, sample=sample)
        learned = self.config.own("variance_type") and self.config.prediction_type == "epsilon"
        return model_output[:, : sample.shape[1]] if learned else model_output

    def _read(self, predicted: Tensor, x: Tensor, i: int) -> Tensor:
        """What stands in the integral: x0, or the noise beside it. Bounds are those of x0 all the same."""
        if self.config.algorithm_type.endswith("++"):
            return self._bound(self._x0_at(predicted, x, i))
        eps = self._eps_at(predicted, x, i)
        if self.config.thresholding:
            alpha, sigma, _ = self._point(i)
            eps = (x - alpha * self._bound((x - sigma * eps) / alpha)) / sigma
        return eps

    def _advance(self, x: Tensor, s: int, t: int, D: list[Tensor], noise: Tensor | None) -> Tensor:
        """From place s to t of the grid, with D = (m, h m', h^2 m'') of as many terms as the order is:

            x_t = ratio x_s - scale ((e^z - 1) m + ((e^z - 1) / z - 1) h m' + ((e^z - 1 - z) / z^2 - 1/2) h^2 m'')

        `midpoint` has (e^z - 1) / 2 in the second term, equal up to z^2. The SDE's decay is twice as fast, and noise
        keeps the variance.
        """
        kind, (_, sigma, _) = self.config.algorithm_type, self._point(t)
        of_noise, sde = not kind.endswith("++"), kind.startswith("sde")
        ratio, scale, z = self._interval(s, t, of_noise)
        if sde and of_noise:
            scale, deviation = 2 * scale, sigma * (torch.exp(2 * z) - 1) ** 0.5
        elif sde:
            ratio, z = ratio * torch.exp(z), 2 * z
            deviation = sigma * (1 - torch.exp(z)) ** 0.5

        grown = torch.exp(z) - 1  # expm1 would be exact where z is small, but isn't the reference's
        weights = [grown, grown / z - 1, (grown - z) / z**2 - 0.5]  # z phi_1, z phi_2, z phi_3
        if sde:  # the reference's sign. Right would be that above: the weight then falls to 0 with z, and not to 1
            weights[2] = (grown - z) / z**2 + 0.5
        if len(D) == 2 and self.config.solver_type == "midpoint":
            weights[1] = grown / 2
        x = ratio * x
        for weight, term in zip(weights, D, strict=False):
            x = x - scale * weight * term
        return x + deviation * noise if sde else x

    def _begins(self, i: int, order: int) -> int:
        """The place from which the step to place i + 1 goes."""
        return i

    def _check_levels(self) -> None:
        super()._check_levels()
        n = len(self.timesteps)
        start = self._begins(n - 1, self._order(n - 1, n))
        if self.config.algorithm_type.startswith("sde") and self._point(n)[2] < self._point(start)[2]:
            raise ValueError(
                f"the last step goes up, from sigma {self.sigmas[start]:.8g} to {self.sigmas[-1]:.8g}, where no noise "
                "is to be added: set final_sigmas_type='zero', or take fewer steps"
            )
