"""What all samplers share: the tables, the grid of timesteps, the position in it, and the readings of a prediction.

A scheduler knows no model. It is given a model's output at a timestep and says what the sample is at the one before.
A run is a grid, a position in it (`step_index`), and a rule for one interval: `step`, each sampler's own.

The tables are float32 and stay on the CPU, where a lookup waits for no other device. A timestep that lives elsewhere
has to be fetched from there, so a loop that must not wait passes CPU tensors or Python numbers to `step`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..loading.component import REGISTRY, Configured
from ..loading.config import Config, Share, Width
from ..outputs import output
from .schedule import make_betas, rescale_zero_terminal_snr

Spacing = Literal["linspace", "leading", "trailing"]  # arXiv 2305.08891, table 2


@dataclass(frozen=True, eq=False)
class SamplerConfig(Config):
    """What all samplers' configs have in common: another sampler's keys are kept.

    `renamed`: what other samplers' folders hold in a key, and what that becomes here.
    """

    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __post_init__(self):
        for key, names in self.renamed.items():
            value = getattr(self, key)
            object.__setattr__(self, key, names.get(value, value) if isinstance(value, str) else value)
        super().__post_init__()

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str | None = None) -> Self:
        """Leaves a pipeline's components and settings out, which stand where `pipe.config` was taken for its
        scheduler's."""
        parts = [key for key, value in values.items() if _is_part(value)]
        if parts:
            warnings.warn(
                f"{where or cls.__name__}: {', '.join(parts)} belong to a pipeline, and are left out. Was its"
                " scheduler.config meant? Then what isn't said here, the betas perhaps, is the default and wrong",
                stacklevel=3,
            )
            values = {key: value for key, value in values.items() if key not in (*parts, *SETTINGS)}
        return super().read(values, where)

    @classmethod
    def is_inert(cls, key: str) -> bool:
        """Another sampler's key is kept, so that swapping back restores it."""
        samplers = [known.Config for known in REGISTRY.values() if issubclass(known, Sampler)]
        return key in FOREIGN or any(key in config.known() for config in samplers)

    def own(self, key: str, default: Any = None) -> Any:
        """A key's value if this class has the key. Another sampler's, which is only kept here, isn't read."""
        return vars(self).get(key, default)


@dataclass(frozen=True, eq=False)
class SchedulerConfig(SamplerConfig):
    """The keys of nearly every sampler. Each adds its own, by name alone."""

    num_train_timesteps: Width = 1000
    beta_start: Share = 0.0001
    beta_end: Share = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[Share, ...] | None = None  # in place of the schedule; a longer list is used from its start

    def __post_init__(self):
        super().__post_init__()
        fits = self.trained_betas is None or len(self.trained_betas) >= self.num_train_timesteps
        self.require(fits, "trained_betas", "have num_train_timesteps values")


# Keys that no sampler here has, but that files on the Hub do
FOREIGN = {
    "noise_sampler_seed": "another system's sampler's",
    **dict.fromkeys(("tensor_format", "timestep_values"), "the Hub's oldest files': NumPy or PyTorch, and null"),
    "timesteps": "training scripts': the number of steps that they drew samples with",
}
SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker", "requires_aesthetics_score")


def _is_part(value: Any) -> bool:
    """Whether a pipeline's index says this of a component: its library and class, or twice null."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(word, str | None) for word in value)


@output
class SchedulerOutput(NamedTuple):
    """What `step` returns: the sample at the next place of the grid, in the shape of the sample given."""

    prev_sample: Tensor


@output
class StepOutput(NamedTuple):
    """The sample at the next place of the grid, and the x0 that the model sees in the present one."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Sampler(Configured, abstract=True):
    """Base of all samplers. A run is `set_timesteps(n)`, then one `step` for each of `timesteps`.

    Attributes:
        timesteps: descending, on the device that `set_timesteps` was given; int64, or float32 where levels lie between.
        grid: the same on the CPU.
        num_inference_steps: the `n` of `set_timesteps`, None before it.
        step_index, begin_index: the place in the grid of the next step, and of the first one; None until known.
        history: past predictions, newest last. It is replaced, never changed, so that a copy of the scheduler is a run.
        init_noise_sigma: what to scale the first noise by. order: model calls a step.
        own_loop: empty where any pipeline can run the sampler; else why not, to end a pipeline's error with.
    """

    Config = SamplerConfig
    files = ("scheduler_config.json",)
    order: ClassVar[int] = 1
    own_loop: ClassVar[str] = ""
    init_noise_sigma: float | Tensor = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_inference_steps: int | None = None

    @property
    def compatibles(self) -> list[type["Sampler"]]:
        """The samplers that this one's config makes too, by `from_config`: all that any pipeline can run."""
        return sorted({cls for cls in REGISTRY.values() if issubclass(cls, Sampler) and not cls.own_loop}, key=str)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # The grid and the position in it

    def _begin(self, timesteps: Sequence[int] | np.ndarray | Tensor, device: torch.device | str | None = None) -> None:
        """Lays the grid of a new run, and forgets the one before."""
        self.grid = torch.as_tensor(timesteps)
        try:
            self.timesteps = self.grid.to(device=device)
        except (RuntimeError, TypeError, AssertionError) as error:  # the last: torch without CUDA
            raise ValueError(f"device={device!r} is not supported: {error}") from None
        self.step_index: int | None = None
        self.begin_index: int | None = None
        self.history: tuple[Tensor, ...] = ()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The place in the grid at which the first `step` stands: image-to-image begins midway."""
        self.begin_index = as_integer(begin_index, "begin_index")

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of `timestep` in the grid: the second one where it stands twice, so that no level is left out by a
        loop that starts there."""
        grid = self.grid if schedule_timesteps is None else schedule_timesteps
        wanted = timestep.to(grid.device) if isinstance(timestep, Tensor) else timestep
        places = (grid == wanted).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"timestep={timestep} is none of those that set_timesteps planned: {grid.tolist()}")
        return places[min(1, len(places) - 1)]

    def _places(self, timesteps: Tensor) -> list[int]:
        """Where noise is added: once set_begin_index was called, at the present step or the first one; else at the
        `timesteps` (B,) given."""
        if self.begin_index is None:
            return [self.index_for_timestep(t) for t in timesteps]
        return [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)

    def _enter(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> int:
        """The place in the grid at which a `step` stands, once its arguments are known to fit. `_leave` counts on."""
        self._check_tensors(model_output, sample)
        self._planned()
        return self._place(timestep)

    def _planned(self, what: str = "step") -> int:
        """How many steps were planned. Raises a ValueError if none."""
        if self.num_inference_steps is None:
            raise ValueError(f"num_inference_steps is None: call set_timesteps before {what}")
        return self.num_inference_steps

    def _place(self, timestep: float | Tensor) -> int:
        """Where the run stands. It begins at `begin_index`, else at the timestep given first, and is counted on."""
        if self.step_index is None and self.begin_index is None:
            # The first timestep may stand twice, where levels are above the training's or timesteps are rounded. The
            # reference begins at the second place then, and fails one step before the end.
            self.step_index = 0 if timestep == self.timesteps[0] else self.index_for_timestep(timestep)
        elif self.step_index is None:
            self.step_index = self.begin_index
        if not 0 <= self.step_index < len(self.timesteps):
            n = len(self.timesteps)
            raise ValueError(f"step {self.step_index + 1} of {n}: the run is over, call set_timesteps for a new one")
        return self.step_index

    def _leave(
        self, prev_sample: Tensor, x0: Tensor | None = None, return_dict: bool = True, kind: type = StepOutput
    ) -> tuple:
        """Counts the position on, and packs what `step` returns: the sample, and as a rule the x0 seen."""
        self.step_index = None if self.step_index is None else self.step_index + 1
        result = SchedulerOutput(prev_sample) if x0 is None else kind(prev_sample, x0)
        return result if return_dict else tuple(result)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Returns `sample`: these samplers show the model what they hold. Others divide by the noise level first."""
        return sample

    def _check_tensors(self, model_output: Tensor, sample: Tensor) -> None:
        check_tensors(model_output=model_output, sample=sample)
        if model_output.shape != sample.shape:
            given, needed = tuple(model_output.shape), tuple(sample.shape)
            raise ValueError(f"model_output has shape {given}, but sample {needed}: they must agree")
        if not (model_output.is_floating_point() and sample.is_floating_point()):
            given = f"{model_output.dtype} and {sample.dtype}"
            raise TypeError(f"model_output and sample must be floating-point tensors, but are {given}")


class Scheduler(Sampler, abstract=True):
    """Base of the samplers that count in the timesteps of a schedule of betas: nearly all.

    Attributes:
        betas, alphas, alphas_cumprod: float32 tables of `num_train_timesteps` values, by timestep.
        final_alpha_cumprod: the alpha_bar that stands before timestep 0.
    """

    Config = SchedulerConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        c = self.config
        betas = make_betas(c.beta_schedule, c.num_train_timesteps, c.beta_start, c.beta_end, c.trained_betas)
        self.betas = rescale_zero_terminal_snr(betas) if c.own("rescale_betas_zero_snr") else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if c.own("set_alpha_to_one", True) else self.alphas_cumprod[0]
        self._begin(torch.arange(len(self)).flip(0))

    def _spaced(self, num_inference_steps: int, spare: int = 0, total: int | None = None) -> np.ndarray:
        """`num_inference_steps` timesteps, descending, spaced as `timestep_spacing` says; float64.

        `spare` levels more are laid out, of which the last ones aren't used (DPM-Solver's grids have one). Only the
        first `total` of the training's timesteps are used, if given.
        """
        n, T = as_integer(num_inference_steps, "num_inference_steps"), len(self)
        if total is not None and not 1 <= (T := as_integer(total, "num_train_timesteps")) <= len(self):
            raise ValueError(f"num_train_timesteps={T} must lie in 1..{len(self)}, which the config has")
        if not 1 <= n <= T:
            raise ValueError(f"num_inference_steps={n} must lie in 1..{T}, the num_train_timesteps")
        spacing, offset = self.config.own("timestep_spacing", "linspace"), self.config.own("steps_offset", 0)
        if spacing == "linspace":
            grid = np.linspace(0, T - 1, n + spare)[::-1][:n]
        elif spacing == "leading":
            grid = np.arange(n + spare)[::-1][:n] * (T // (n + spare)) + float(offset)
        else:  # "trailing"
            grid = np.arange(T, 0, -T / n).round() - 1
        if grid.min() < 0 or grid.max() >= T:  # a float too many in trailing's arange, or the offset
            raise ValueError(
                f"num_inference_steps={n} with timestep_spacing={spacing!r} and steps_offset={offset} asks for "
                f"timesteps {grid.max():.0f}..{grid.min():.0f}, which leave 0..{T - 1}: take another number of steps"
            )
        return grid

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The grid's timestep after `timestep`, a tensor; -1 after the last. Before `set_timesteps`: the next lower."""
        if self.num_inference_steps is None:  # the training's own grid
            return timestep - 1
        i = self.index_for_timestep(as_integer(timestep, "timestep")) + 1
        return self.grid[i] if i < len(self.grid) else torch.tensor(-1)

    def _listed(self, timesteps: Sequence[int]) -> list[int]:
        """Custom timesteps, whole numbers in descending order."""
        grid = [as_integer(t, "timesteps") for t in timesteps]
        if not grid or any(t <= t_next for t, t_next in pairwise(grid)):
            raise ValueError(f"timesteps={grid} must be in descending order, and at least one")
        if grid[0] >= len(self) or grid[-1] < 0:
            raise ValueError(f"timesteps={grid} must lie in 0..{len(self) - 1}")
        return grid

    def _check_signal(self, timesteps: Sequence[int] | np.ndarray, always: bool = False) -> None:
        """Raises a ValueError where a step would divide by an alpha_bar of 0: for x0 from eps, or `always`."""
        c = self.config
        bounded = c.own("clip_sample") and not c.own("thresholding")  # clipping makes a number of the infinite
        if always or (c.own("prediction_type") == "epsilon" and not bounded):
            for t in timesteps:
                if self.alphas_cumprod[t] == 0:
                    raise ValueError(
                        f"alpha_bar is 0 at timestep {t}, all noise, and {type(self).__name__} divides by it with "
                        f"prediction_type={c.get('prediction_type', 'epsilon')!r}: zero terminal SNR "
                        "(rescale_betas_zero_snr) needs a model of 'v_prediction' and a sampler that has the key"
                    )

    def _check_noise(self, timesteps: Sequence[int] | np.ndarray) -> None:
        """Raises a ValueError where a step would take away noise that isn't there, and divide 0 by 0."""
        for t in timesteps:
            if self.alphas_cumprod[t] == 1:
                raise ValueError(f"alpha_bar is 1 at timestep {t}, free of noise: beta_start must be more than 0")

    # Noise

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples x_t = alpha x0 + sigma eps, (B, ...) from (B, ...). `timesteps` (B,); one can stand for all."""
        check_tensors(original_samples=original_samples, noise=noise, timesteps=timesteps)
        alpha, sigma = self._noise_levels(self._levels_at, timesteps, noise, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a v_prediction model learns to say (arXiv 2202.00512, appendix D). Shapes as in `add_noise`."""
        check_tensors(sample=sample, noise=noise, timesteps=timesteps)
        alpha, sigma = self._noise_levels(self._vp_levels_at, timesteps, noise, sample)
        return alpha * noise - sigma * sample

    def _noise_levels(
        self, levels_at: Callable[..., tuple[Tensor, Tensor]], timesteps: Tensor, noise: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `timesteps`, in the sample's dtype, (B, 1, 1, ...) to broadcast over it."""
        timesteps = timesteps.flatten()
        if noise.shape[1:] != sample.shape[1:]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the samples {tuple(sample.shape)}")
        if timesteps.shape[0] not in (1, sample.shape[0]) and sample.shape[0] != 1:
            raise ValueError(f"timesteps has {timesteps.shape[0]} values for {sample.shape[0]} samples")
        # In half precision 1 - alpha_bar would be lost at low noise, and is in the reference: 0.0292 at timestep 0
        levels = levels_at(timesteps, torch.promote_types(sample.dtype, torch.float32))
        return tuple(x.to(sample.device, sample.dtype).view(-1, *[1] * (sample.ndim - 1)) for x in levels)

    def _levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `timesteps` (B,), in float32 or more: here those of the VP reading, from the table."""
        if timesteps.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"timesteps must be int64 or int32, but are {timesteps.dtype}")
        if timesteps.device.type == "cpu" and not all(0 <= t < len(self) for t in timesteps.tolist()):
            raise ValueError(f"timesteps must lie in 0..{len(self) - 1}, but are {timesteps.tolist()}")
        alpha_bar = self.alphas_cumprod.to(timesteps.device, non_blocking=True).gather(0, timesteps.long()).to(dtype)
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def _vp_levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in the VP reading, in which v is defined, whichever one the sampler holds."""
        return self._levels_at(timesteps, dtype)

    # What the model says

    def _check_step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> int:
        """For samplers that go by the timestep given, in any order: it as an integer, once the arguments fit."""
        self._check_tensors(model_output, sample)
        t = as_integer(timestep, "timestep")
        if not 0 <= t < len(self):
            raise ValueError(f"timestep={t} must lie in 0..{len(self) - 1}")
        return t

    def _stride(self) -> int:
        """The distance of two timesteps, once `set_timesteps` has been called.

        That of the grid itself is another for `trailing` and `linspace`, where n doesn't divide T, and right would be
        the way to the next timestep. The reference steps by T // n all the same, so that more steps don't converge to
        the exact solution: of 1000 timesteps, 600 steps of 1 in place of 1.67 are off by 0.61, 200 steps by 0.015.
        """
        return len(self) // self._planned()

    def _alpha_bar(self, t: int) -> Tensor:
        """alpha_bar at a timestep, a float32 scalar on the CPU. Before timestep 0 stands `final_alpha_cumprod`."""
        if t >= len(self):
            raise ValueError(f"timestep={t} must lie in 0..{len(self) - 1}")
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    def _x0_and_eps(self, predicted: Tensor, alpha_bar: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Both readings of what the model said, whichever of the three `prediction_type`s it speaks.

        All solve x = alpha x0 + sigma eps, and v = alpha eps - sigma x0.
        """
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * predicted) / alpha, predicted
        if self.config.prediction_type == "sample":
            return predicted, (sample - alpha * predicted) / sigma
        return alpha * sample - sigma * predicted, alpha * predicted + sigma * sample

    def _bound(self, x0: Tensor) -> Tensor:
        """Keeps the predicted x0 where pictures live, if the config says so."""
        c = self.config
        if c.own("thresholding"):
            # Imagen (arXiv 2205.11487, section 2.3): saturated pictures are scaled back into [-1, 1], not cut off.
            pixels = x0.flatten(1) if x0.dtype == torch.float64 else x0.flatten(1).float()
            limit = torch.quantile(pixels.abs(), c.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(min=1, max=c.sample_max_value)  # (B, 1)
            return (pixels.clamp(-limit, limit) / limit).view(x0.shape).to(x0.dtype)
        if c.own("clip_sample"):
            return x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        return x0
