"""TCD: Trajectory Consistency Distillation (Zheng et al., arXiv 2402.19159). LCM's grid, with steps to any timestep."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..checks import check_number
from ..noise import Generators, randn_tensor
from ..outputs import output
from .distilled import DistilledScheduler


@output
class TCDSchedulerOutput(NamedTuple):
    """The sample at the next place of the grid, and where the model's own jump led, free of new noise."""

    prev_sample: Tensor
    pred_noised_sample: Tensor


class TCDScheduler(DistilledScheduler):
    """Strategic stochastic sampling, algorithm 4 of the paper. The reference reads neither `clip_sample` nor
    `thresholding` here, and ends at timestep 0's level whatever `set_alpha_to_one` says."""

    unbounded = True

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t past the next timestep to s = (1 - eta) t', and back to t' by noise, in every step but the last:

            x_s = sqrt(alpha_bar_s) x0 + sqrt(1 - alpha_bar_s) eps
            x' = sqrt(alpha_bar' / alpha_bar_s) x_s + sqrt(1 - alpha_bar' / alpha_bar_s) noise

        `eta` 0 is deterministic (DDIM, over the grid's own strides), 1 noises all anew.
        """
        t = self._check_step(model_output, timestep, sample)
        check_number(eta, "eta", least=0, most=1)
        i = self._enter(model_output, timestep, sample)
        t_next = self.grid[i + 1] if i + 1 < len(self.grid) else 0 * self.grid[i]
        s = int((1 - eta) * t_next)  # in float32, as a tensor: float64 would cut some to another timestep
        alpha_bar, alpha_bar_s, alpha_bar_next = (self._alpha_bar(int(level)) for level in (t, s, t_next))

        x0, eps = self._x0_and_eps(model_output, alpha_bar, sample)
        jumped = prev_sample = alpha_bar_s**0.5 * x0 + (1 - alpha_bar_s) ** 0.5 * eps
        if eta > 0 and i != self.num_inference_steps - 1:  # counted as in LCM; at the end x_s is x', and a draw in vain
            noise = randn_tensor(model_output.shape, generator, model_output.device, jumped.dtype)
            kept = alpha_bar_next / alpha_bar_s
            prev_sample = kept**0.5 * jumped + (1 - kept) ** 0.5 * noise
        return self._leave(prev_sample, jumped, return_dict, TCDSchedulerOutput)

    def _distilled(self, original: int | None, strength: float) -> tuple[np.ndarray, int]:
        """All the training's timesteps where `original_inference_steps` is asked for, by whatever number."""
        if original is None:
            return super()._distilled(original, strength)
        return np.arange(int(len(self) * strength)), original
