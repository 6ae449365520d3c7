"""LCM: Latent Consistency Models (Luo et al., arXiv 2310.04378), samples in 1 to 8 steps."""

from typing import NamedTuple

from torch import Tensor

from ..noise import Generators, randn_tensor
from ..outputs import output
from .distilled import DistilledScheduler

SIGMA_DATA = 0.5  # the deviation of the data that the boundary condition supposes


@output
class LCMSchedulerOutput(NamedTuple):
    """The sample at the next place of the grid, and the end of the path as the model sees it."""

    prev_sample: Tensor
    denoised: Tensor


class LCMScheduler(DistilledScheduler):
    """Multistep consistency sampling, algorithm 3 of the paper."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to the path's end, and back to the next timestep's noise, in every step but the last:

        f = c_skip x_t + c_out x0                         eq. 9, with c_skip = 1 and c_out = 0 at timestep 0
        x' = sqrt(alpha_bar') f + sqrt(1 - alpha_bar') noise
        """
        t = self._check_step(model_output, timestep, sample)
        i = self._enter(model_output, timestep, sample)
        t_next = int(self.grid[i + 1]) if i + 1 < len(self.grid) else t
        alpha_bar, alpha_bar_next = self._alpha_bar(t), self._alpha_bar(t_next)

        x0, _ = self._x0_and_eps(model_output, alpha_bar, sample)
        x0 = self._bound(x0)
        scaled = self.config.timestep_scaling * t
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        denoised = prev_sample = c_out * x0 + c_skip * sample

        # Right would be the last place of the grid. With custom timesteps and a strength below 1 that comes before, and
        # the reference leaves the run's end noisy.
        if i != self.num_inference_steps - 1:
            noise = randn_tensor(model_output.shape, generator, model_output.device, denoised.dtype)
            prev_sample = alpha_bar_next**0.5 * denoised + (1 - alpha_bar_next) ** 0.5 * noise
        return self._leave(prev_sample, denoised, return_dict, LCMSchedulerOutput)
