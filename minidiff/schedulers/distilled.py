"""What the samplers of distilled models share. A model that was taught to see where a path ends needs no solver: each
step jumps there, and adds the next timestep's noise. Such a model knows the timesteps of its distillation alone.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from ..checks import as_integer, check_number
from ..loading.config import Share, Width
from .base import Scheduler, SchedulerConfig, Spacing


@dataclass(frozen=True, eq=False, kw_only=True)
class DistilledConfig(SchedulerConfig):
    """The keys of LCMScheduler and TCDScheduler."""

    beta_start: Share = field(default=0.00085, kw_only=False)
    beta_end: Share = field(default=0.012, kw_only=False)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = field(
        default="scaled_linear", kw_only=False
    )
    original_inference_steps: Width = 50  # how many of the training's timesteps the distillation used
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_scaling: float = 10.0
    set_alpha_to_one: bool = True
    timestep_spacing: Spacing = "leading"  # this and the next are in files, but the grid is the distillation's own
    steps_offset: int = 0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: Share = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False


class DistilledScheduler(Scheduler, abstract=True):
    """The grid: every so many of the timesteps that the model was distilled on."""

    Config = DistilledConfig
    unbounded: ClassVar[bool] = False  # whether x0 stays unbounded, whatever the config says

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Plans `num_inference_steps` steps, at most `original_inference_steps` (the config's if None), or `timesteps`.

        `strength`, image-to-image's, in 0..1: the run begins at that share of the way, or of the `timesteps`.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass either num_inference_steps or timesteps")
        check_number(strength, "strength", least=0, most=1)
        distilled, most = self._distilled(original_inference_steps, strength)
        if timesteps is None:
            n, most = as_integer(num_inference_steps, "num_inference_steps"), min(most, len(distilled))
            if not 1 <= n <= most:
                raise ValueError(
                    f"num_inference_steps={n} must lie in 1..{most}: of original_inference_steps, the timesteps that "
                    f"the model was distilled on, strength={strength} leaves no more"
                )
            grid = distilled[::-1][np.linspace(0, len(distilled), n, endpoint=False).astype(int)]
        else:
            given = self._listed(timesteps)
            n, grid = len(given), given[len(given) - int(len(given) * strength) :]
            if not grid:
                raise ValueError(f"strength={strength} leaves none of the {n} timesteps")
            if foreign := sorted({*given} - {*distilled.tolist()}):
                warnings.warn(f"timesteps={foreign} are none of the model's distillation", stacklevel=2)
        self._check_signal(grid, always=self.unbounded and self.config.prediction_type == "epsilon")
        self._begin(grid, device)
        self.num_inference_steps = n

    def _distilled(self, original: int | None, strength: float) -> tuple[np.ndarray, int]:
        """The ascending timesteps that a run chooses from, and how many it may choose."""
        original = (
            self.config.original_inference_steps
            if original is None
            else as_integer(original, "original_inference_steps")
        )
        if not 1 <= original <= len(self):
            raise ValueError(f"original_inference_steps={original} must lie in 1..{len(self)}")
        return np.arange(1, int(original * strength) + 1) * (len(self) // original) - 1, original
