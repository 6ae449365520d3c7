"""DPM-Solver++ (Lu et al., arXiv 2211.01095), its noise-predicting forerunner (arXiv 2206.00927), and their SDEs."""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..loading.component import check_tensors
from ..noise import Generators, randn_tensor
from .base import SchedulerOutput, Spacing
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
        third = kind == "sde-dpmsolver" and self.solver_order == 3
        self.require(not third, "solver_order", "be 1 or 2 for algorithm_type 'sde-dpmsolver', which has no third")


@dataclass(frozen=True, eq=False, kw_only=True)
class DPMSolverMultistepConfig(DPMSolverConfig):
    """The keys of DPMSolverMultistepScheduler."""

    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False  # even in lambda
    rescale_betas_zero_snr: bool = False


DPMSolverConfig.renamed = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}
DPMSolverConfig.fixed = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}


class DPMSolver(SolverScheduler, abstract=True):
    """The formula of both DPM-Solvers, which differ in where the past predictions lie."""

    Config = DPMSolverConfig

    @property
    def rounded(self) -> bool:
        return self.config.beta_schedule != "squaredcos_cap_v2"

    def _split(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the model predicts, without the variance where it has learned one."""
        check_tensors(model_output=model_output, sample=sample)
        learned = self.config.variance_type and self.config.prediction_type == "epsilon"
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

    def _check_levels(self) -> None:
        super()._check_levels()
        n = len(self.timesteps)
        if self.config.algorithm_type.startswith("sde") and self._point(n)[2] < self._point(n - 1)[2]:
            raise ValueError(
                f"the last step goes up, from sigma {self.sigmas[-2]:.8g} to {self.sigmas[-1]:.8g}, where no noise is "
                "to be added: set final_sigmas_type='zero', or take fewer steps"
            )


class DPMSolverMultistepScheduler(DPMSolver):
    """Order 1 to 3 at one model call a step, from the last predictions.

    Order 3 converges as order 2 does: its `h^2 m''` is half of what the formula needs, as in the reference. In float64
    the error against the exact solution falls with the power 2.0 of the steps.
    """

    Config = DPMSolverMultistepConfig

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
        predicted = self._split(model_output, sample)
        i = self._enter(predicted, timestep, sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        self.history = (*self.history, self._read(predicted, x, i))[-self.config.solver_order :]

        noise, sde = variance_noise, self.config.algorithm_type.startswith("sde")
        if noise is not None and not sde:
            warnings.warn(f"variance_noise has no effect: {self.config.algorithm_type} adds none", stacklevel=2)
        if noise is None and sde:
            noise = randn_tensor(predicted.shape, generator, predicted.device, torch.float32)
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
