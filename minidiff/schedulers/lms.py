"""Linear multistep (Adams-Bashforth) in the noise level, for levels at any distance: Hairer, Norsett, Wanner, III.5."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import as_integer
from .base import StepOutput
from .sigma import KarrasConfig, SigmaScheduler


@dataclass(frozen=True, eq=False, kw_only=True)
class LMSDiscreteConfig(KarrasConfig):
    """The keys of LMSDiscreteScheduler."""


class LMSDiscreteScheduler(SigmaScheduler):
    """One model call a step: the slope between two levels is the polynomial through the last slopes seen."""

    Config = LMSDiscreteConfig
    spaced_at_first = True

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans `num_inference_steps` steps, at most `num_train_timesteps`, and forgets all past slopes."""
        self._plan(num_inference_steps, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From sigma_i to sigma_(i+1), with the last `order` slopes:

            slope = (x - x0) / sigma
            x' = x + sum_k w_k slope_(i-k),  w_k the integral from sigma_i to sigma_(i+1) of k's Lagrange polynomial

        The first steps of a run have fewer slopes, and are of lower order.
        """
        i = self._enter(model_output, timestep, sample)
        order = as_integer(order, "order")
        if order < 1:
            raise ValueError(f"order={order} must be 1 or more: the number of slopes that a step reads")
        sigma = self.sigmas[i]
        x0 = self._x0(model_output, sample, sigma)
        slope = (sample - x0) / sigma

        self.history = (*self.history, slope)
        self.history = self.history[len(self.history) > order :]
        # Right would be as many nodes as slopes. A run that begins midway, at i > 0, has fewer of these at first, and
        # the weights that the reference takes all the same don't add up to sigma_(i+1) - sigma_i.
        nodes = min(order, i + 1)
        weights = adams_weights(self.sigmas[i - nodes + 1 : i + 2])
        x = sample + sum(w * past for w, past in zip(weights, reversed(self.history), strict=False))
        return self._leave(x, x0, return_dict)


def adams_weights(sigmas: Tensor) -> list[float]:
    """Newest first, for the slopes at all `sigmas` but the last, over the interval between the last two.

    The integrals of the Lagrange polynomials are the weights that integrate 1, u, u^2, ... without error, where u runs
    from 0 to 1 in the interval. In sigma itself the powers of nearly equal levels would cancel.
    """
    *nodes, sigma, sigma_next = sigmas.double().tolist()
    h = sigma_next - sigma
    u = (np.array([sigma, *reversed(nodes)]) - sigma) / h
    powers = np.arange(len(u))
    return (h * np.linalg.solve(u ** powers[:, None], 1 / (powers + 1))).tolist()
