"""PNDM: Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., arXiv 2202.09778)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .base import Scheduler, SchedulerConfig, SchedulerOutput, Spacing

# Adams-Bashforth: the weights of the predictions, newest first, and their common divisor, for 1 to 4 of them.
PLMS_WEIGHTS = (((1,), 1), ((3, -1), 2), ((23, -16, 5), 12), ((55, -59, 37, -9), 24))  # the last is eq. 12
PRK_WEIGHTS = (1 / 6, 1 / 3, 1 / 3, 1 / 6)  # eq. 13


@dataclass(frozen=True, eq=False, kw_only=True)
class PNDMConfig(SchedulerConfig):
    """The keys of PNDMScheduler."""

    skip_prk_steps: bool = False  # Stable Diffusion starts with PLMS of lower order instead
    set_alpha_to_one: bool = False  # whether the last step ends at alpha_bar 1, free of noise, or at timestep 0's
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"  # the reference has no "sample"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0


class PNDMScheduler(Scheduler):
    """Fourth order from the last four predictions (PLMS), which Runge-Kutta (PRK) or lower orders have to start.

    The averages are those of the model's raw outputs: eps or v, as the config says. With eps the error against the
    exact solution falls with the square of the steps; with v, whose meaning changes with the timestep, as DDIM's does.
    Of a model that says x0 the eps are averaged.
    """

    Config = PNDMConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.timesteps = self.prk_timesteps = self.plms_timesteps = None  # until set_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Plans the steps, at most `num_train_timesteps` and with PRK at least 4, and forgets all past predictions."""
        grid = self._spaced(num_inference_steps).round().astype("int64")
        self._check_signal(grid, always=True)
        self._check_noise(grid)
        if self.config.skip_prk_steps:
            self.prk_timesteps = grid[:0]
            self.plms_timesteps = np.concatenate([grid[:1], grid[1:2], grid[1:]])  # the first step is taken twice
        elif len(grid) < 4:
            raise ValueError(f"num_inference_steps={len(grid)} must be at least 4, or skip_prk_steps be true")
        else:
            half = len(self) // len(grid) // 2
            stages = [(t, t_next + half, t_next + half, t_next) for t, t_next in pairwise(grid[:4])]
            self.prk_timesteps = np.concatenate(stages)
            self.plms_timesteps = grid[3:]
        self._begin(np.concatenate([self.prk_timesteps, self.plms_timesteps]), device)
        self.num_inference_steps = len(grid)
        self.counter = 0  # of calls to step, wherever in the grid the first one was

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:  # model_output, sample: (B, C, H, W)
        """From x_t to the next sample that the model has to see, by `step_prk` or `step_plms`, whichever is due."""
        self._stride()
        step = self.step_prk if self.counter < len(self.prk_timesteps) else self.step_plms
        return step(model_output, timestep, sample, return_dict)

    def step_prk(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """One of the four stages of a Runge-Kutta step, eq. 13: all start from the sample of the first stage."""
        half = self._stride() // 2
        t = self._check_step(model_output, timestep, sample)
        model_output = self._eps_for_x0(model_output, t, sample)
        if self.counter >= len(self.prk_timesteps):
            raise ValueError(f"step_prk has {len(self.prk_timesteps)} stages to run, and all are done")
        stage = self.counter % 4
        if stage == 0:
            self.start, self.start_sample, self.average = t, sample, 0
            self.history = (*self.history, model_output)
        self.average = self.average + PRK_WEIGHTS[stage] * model_output
        prediction = self.average if stage == 3 else model_output
        target = t - half if stage in (0, 2) else t  # the model was called at t, t_mid, t_mid and t_next
        return self._move(prediction, self.start_sample, self.start, target, return_dict)

    def step_plms(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple:
        """A linear multistep step, eq. 12. Without PRK the first step is taken twice, with the mean of both ends."""
        stride = self._stride()  # T // n, not the grid's own: see there
        t = self._check_step(model_output, timestep, sample)
        model_output = self._eps_for_x0(model_output, t, sample)
        if not self.config.skip_prk_steps and len(self.history) < 3:
            raise ValueError("step_plms needs 3 past predictions: run the 12 stages of step_prk first")
        if self.counter == 0:
            self.start_sample = sample
        if self.counter == 1:
            prediction = (model_output + self.history[-1]) / 2
            return self._move(prediction, self.start_sample, t + stride, t, return_dict)
        self.history = (*self.history[-3:], model_output)
        weights, divisor = PLMS_WEIGHTS[len(self.history) - 1]
        prediction = 1 / divisor * sum(w * past for w, past in zip(weights, reversed(self.history), strict=True))
        return self._move(prediction, sample, t, t - stride, return_dict)

    def _eps_for_x0(self, model_output: Tensor, t: int, sample: Tensor) -> Tensor:
        """What is averaged, of a model that was called with `sample` at timestep t: eps in place of x0."""
        if self.config.prediction_type != "sample":
            return model_output
        return self._x0_and_eps(model_output, self._alpha_bar(t), sample)[1]

    def _move(
        self, prediction: Tensor, sample: Tensor, t: int, t_prev: int, return_dict: bool
    ) -> SchedulerOutput | tuple:
        """The transfer phi of eq. 11 along the curve of eq. 9, from timestep t to t_prev."""
        alpha_bar, alpha_bar_prev = self._alpha_bar(t), self._alpha_bar(t_prev)
        eps = prediction
        if self.config.prediction_type == "v_prediction":
            _, eps = self._x0_and_eps(prediction, alpha_bar, sample)
        denominator = alpha_bar * (1 - alpha_bar_prev) ** 0.5 + (alpha_bar * (1 - alpha_bar) * alpha_bar_prev) ** 0.5
        prev_sample = (alpha_bar_prev / alpha_bar) ** 0.5 * sample - (alpha_bar_prev - alpha_bar) * eps / denominator
        self.counter += 1
        return self._leave(prev_sample, None, return_dict)
