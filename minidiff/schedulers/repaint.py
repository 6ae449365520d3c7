"""RePaint: inpainting with a model that was never trained for it (Lugmayr et al., arXiv 2201.09865)."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..loading.config import Share
from ..noise import Generators, randn_tensor
from .base import Scheduler, SchedulerConfig, StepOutput
from .ddim import share_noise


@dataclass(frozen=True, eq=False, kw_only=True)
class RePaintConfig(SchedulerConfig):
    """The keys of RePaintScheduler. Its models predict eps."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = field(
        default="linear", kw_only=False
    )
    eta: float = 0.0
    trained_betas: tuple[Share, ...] | None = None
    clip_sample: bool = True


class RePaintScheduler(Scheduler):
    """DDIM's step where the picture is painted, the forward process where it is known; and jumps back, again and again,
    so that both grow together. `eta`, which may be set between runs: 0 is DDIM's, 1 is DDPM's."""

    Config = RePaintConfig
    own_loop = "takes the picture and its mask in each step, and jumps back by undo_step: RePaintPipeline runs it"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eta = self.config.eta

    def set_timesteps(
        self,
        num_inference_steps: int,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        device: torch.device | str | None = None,
    ) -> None:
        """Plans `num_inference_steps` levels: each `jump_length` of them is walked `jump_n_sample` times, all in all.

        Where `timesteps` rise, `undo_step` is due in place of `step`.
        """
        n, jump = as_integer(num_inference_steps, "num_inference_steps"), as_integer(jump_length, "jump_length")
        if not 1 <= n <= len(self) or jump < 1:
            raise ValueError(f"num_inference_steps={n} must lie in 1..{len(self)}, and jump_length={jump} be 1 or more")
        jumps = dict.fromkeys(range(0, n - jump, jump), as_integer(jump_n_sample, "jump_n_sample") - 1)
        level, grid = n, []
        while level > 0:
            level -= 1
            grid.append(level)
            if jumps.get(level, 0) > 0:
                jumps[level] -= 1
                grid += range(level + 1, level + jump + 1)
                level += jump
        timesteps = np.array(grid) * (len(self) // n)
        self._check_signal(timesteps, always=True)
        self._check_noise(timesteps)
        self._begin(timesteps, device)
        self.num_inference_steps = n

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple:  # model_output, sample: (B, C, H, W); mask: (B, 1, H, W), 0 is painted, 1 is known
        """From x_t to x_{t-1}, algorithm 1: DDIM's step (arXiv 2010.02502, eq. 12 and 16) where the mask is 0,

        x_{t-1} = sqrt(alpha_bar') image + sqrt(1 - alpha_bar') noise         eq. 8a, where the mask is 1
        """
        stride = self._stride()
        t = self._check_step(model_output, timestep, sample)
        check_tensors(original_image=original_image, mask=mask)
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t - stride)

        x0 = (sample - (1 - alpha_bar) ** 0.5 * model_output) / alpha_bar**0.5
        x0 = x0.clamp(-1, 1) if self.config.clip_sample else x0
        sigma, remaining = share_noise(self.eta, t, alpha_bar, alpha_bar_prev)
        noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        painted = alpha_bar_prev**0.5 * x0 + remaining**0.5 * model_output + sigma * noise
        known = alpha_bar_prev**0.5 * original_image + (1 - alpha_bar_prev) ** 0.5 * noise
        return self._leave(mask * known + (1.0 - mask) * painted, x0, return_dict)

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Generators = None) -> Tensor:
        """From x_t back to the sample of one step before, by the forward process, timestep by timestep."""
        t, stride = as_integer(timestep, "timestep"), self._stride()
        if not 0 <= t <= len(self) - stride:
            raise ValueError(f"timestep={t} must lie in 0..{len(self) - stride}, so that a step leads to it")
        for beta in self.betas[t : t + stride]:
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            sample = (1 - beta) ** 0.5 * sample + beta**0.5 * noise
        return sample
