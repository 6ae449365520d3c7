"""Samplers that count in noise levels: a run is a grid of sigmas, from much noise to none, and a rule for an interval.

Two families share the grid. The VE samplers (Euler, Heun, LMS, KDPM2) hold x = x0 + sigma eps and show the model x
divided by sqrt(sigma^2 + 1), which is the VP reading. The solvers (DPM-Solver, UniPC, DEIS) hold the VP reading itself,
x = alpha x0 + sigma eps, and count in lambda = log(alpha) - log(sigma), half the log of the signal-to-noise ratio.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .base import SamplerConfig, Scheduler, SchedulerConfig, Spacing
from .schedule import ve_sigmas, vp_level

GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
TINY = 2**-24  # alpha_bar at the last timestep of a schedule with zero terminal SNR, whose sigma would be infinite


@dataclass(frozen=True, eq=False, kw_only=True)
class SigmaConfig(SchedulerConfig):
    """The keys of the grid that all samplers of this kind have."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class KarrasConfig(SigmaConfig):
    """And of the grids that are spaced in sigma, whatever the timesteps: one of them at a time."""

    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    def __post_init__(self):
        super().__post_init__()
        check_one_grid(self)


class SigmaScheduler(Scheduler, abstract=True):
    """The VE reading. `sigmas` are the levels of the run, one more than steps, float32, on the CPU."""

    Config = SigmaConfig
    spare = 0  # levels that the grid of timesteps has at its end, but the run hasn't
    dtype = np.float32  # of the timesteps
    rounded = False  # whether the timesteps of a Karras grid are whole
    spaced_at_first = False  # whether a grid spaced in sigma is laid before set_timesteps too, as long as the training

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.own("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = TINY
        self.table = ve_sigmas(self.alphas_cumprod).numpy()  # by timestep, float32
        timesteps = np.arange(len(self))[::-1].astype(np.float32)
        grid = self._levels(timesteps) if self.spaced_at_first else (timesteps, self.table[: len(self)][::-1])
        self._lay(*grid, 0.0)

    # The grid

    def _plan(
        self,
        num_inference_steps: int | None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """`set_timesteps` of every sampler: a number of steps, or the timesteps, or the sigmas with the last one."""
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        if sum(value is not None for value in given.values()) != 1:
            names = [name for name in given if name in inspect.signature(self.set_timesteps).parameters]
            raise ValueError(f"give one of {', '.join(names)}, and not more")
        if sigmas is not None:
            levels = descending(sigmas, "sigmas", least=0, count=2).astype(np.float32)
            grid, last = (self._timesteps_of(levels[:-1]), levels[:-1]), levels[-1]
        else:
            if timesteps is None:
                spaced = self._spaced(num_inference_steps, spare=self.spare, total=num_train_timesteps)
            else:
                spaced = self._given(timesteps)
            grid = self._levels(spaced.astype(np.float32))
            last = self._last_sigma(grid[1])
        self._lay(*grid, last, device)
        self.num_inference_steps = len(grid[0])

    def _lay(self, timesteps: np.ndarray, sigmas: np.ndarray, last: float, device: str | None = None) -> None:
        """The grid: a model's timestep and a sigma for each step, and the sigma at which the last step ends."""
        self.sigmas = torch.from_numpy(np.append(sigmas, last).astype(np.float32))
        self._begin(torch.from_numpy(timesteps.astype(self.dtype)), device)

    def _given(self, timesteps: Sequence[float]) -> np.ndarray:
        """Custom timesteps, which leave no choice to a grid that is spaced in sigma."""
        for key in (*GRIDS, "use_flow_sigmas"):
            if self.config.own(key):
                raise ValueError(f"timesteps was given, but {key} is true and chooses them: set one of the two")
        grid = descending(timesteps, "timesteps", least=0)
        if grid[0] > len(self) - 1:
            raise ValueError(f"timesteps={list(timesteps)} must lie in 0..{len(self) - 1}")
        return grid

    def _levels(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps and the sigmas of a run: those of the training's table, or a grid spaced in sigma."""
        c, n = self.config, len(timesteps)
        sigmas = np.interp(timesteps, np.arange(len(self.table)), self.table)
        if c.own("interpolation_type") == "log_linear":  # n + 1 levels, of which the last two steps leave one out
            ends = np.log(self.table[[-1, 0]])
            sigmas = torch.linspace(*ends.tolist(), n + 1).exp().numpy()
        if c.own("use_lu_lambdas"):
            most, least = np.log(self.table)[[-1, 0]].tolist()
            spaced = np.exp(most + np.linspace(0, 1, n) * (least - most))
        else:
            spaced = spaced_in_sigma(c, *self._ends(sigmas), n)
        if spaced is None:
            return timesteps, sigmas
        sigmas = spaced
        timesteps = self._timesteps_of(sigmas)
        whole = self.rounded and (c.own("use_karras_sigmas") or c.own("use_lu_lambdas"))
        return timesteps.round() if whole else timesteps, sigmas

    def _ends(self, sigmas: np.ndarray) -> tuple[float, float]:
        """The largest and the smallest level of a grid that is spaced in sigma."""
        most, least = self.config.own("sigma_max"), self.config.own("sigma_min")
        return sigmas[0].item() if most is None else most, sigmas[-1].item() if least is None else least

    def _last_sigma(self, sigmas: np.ndarray) -> float:
        """Where the last step ends: free of noise, or at the level of timestep 0."""
        return self.table[0] if self.config.own("final_sigmas_type") == "sigma_min" else 0.0

    def _timesteps_of(self, sigmas: np.ndarray, dtype: type = np.float64) -> np.ndarray:
        """Between which two of the training's levels each sigma lies, linear in log sigma: a fractional timestep."""
        table, log_sigmas = np.log(self.table), np.log(np.maximum(sigmas, 1e-10))
        # The last level that isn't above. (With zero terminal SNR TINY isn't the least, and the table isn't sorted.)
        i = np.cumsum(table[:, None] <= log_sigmas, axis=0).argmax(axis=0).clip(max=len(table) - 2)
        w = ((table[i] - log_sigmas) / (table[i] - table[i + 1])).clip(0, 1)
        i = i.astype(dtype)
        return (1 - w) * i + w * (i + 1)

    # The readings

    @property
    def init_noise_sigma(self) -> Tensor:
        """The first level. `leading` doesn't begin at the table's end, and the reference then takes x's deviation."""
        most = self.sigmas.max()
        return (most**2 + 1) ** 0.5 if self.config.timestep_spacing == "leading" else most

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the model sees: the VP reading, x / sqrt(sigma^2 + 1)."""
        return sample / (self._seen(self._place(timestep)) ** 2 + 1) ** 0.5

    def _seen(self, i: int) -> Tensor:
        """The level that the model is called at, at a place in the grid."""
        return self.sigmas[i]

    def _x0(self, predicted: Tensor, sample: Tensor, sigma: Tensor, sigma_hat: Tensor | None = None) -> Tensor:
        """What the model takes for x0 at the level sigma; `sigma_hat` where noise was added to the sample since."""
        if self.config.prediction_type == "epsilon":
            return sample - (sigma if sigma_hat is None else sigma_hat) * predicted
        if self.config.prediction_type == "sample":
            return predicted
        return predicted * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)

    def _levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._reading(self.sigmas[self._places(timesteps)].to(dtype))

    def _vp_levels_at(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return vp_level(self.sigmas[[self.index_for_timestep(t) for t in timesteps]].to(dtype))

    def _reading(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of x = alpha x0 + sigma eps."""
        return torch.ones_like(sigma), sigma


class TwoStageScheduler(SigmaScheduler, abstract=True):
    """Second order by two calls an interval: where it begins (places 0, 2, 4, ...), and where Euler's step from there
    leads. The second stage starts from the first one's sample again. The last interval, which ends at 0, has one stage.

    Every level but the first stands twice in `sigmas`: where an interval ends, and where the next one begins.
    """

    order = 2
    spaced_at_first = True

    def _lay(self, timesteps: np.ndarray, sigmas: np.ndarray, last: float, device: str | None = None) -> None:
        twice = [0, *np.repeat(np.arange(1, len(sigmas)), 2)]
        places = timesteps[twice]
        places[1::2] = self._between(timesteps, torch.from_numpy(np.append(sigmas, last).astype(np.float32)))
        super()._lay(places, sigmas[twice], last, device)

    def _between(self, timesteps: np.ndarray, levels: Tensor) -> np.ndarray:
        """The timesteps of the second stages, one fewer than of the first ones."""
        return timesteps[1:]

    def _place(self, timestep: float | Tensor) -> int:
        """A run that begins midway begins where an interval does: of two equal timesteps that is the second one."""
        i = super()._place(timestep)
        if i % 2 and not self.history:
            raise ValueError(f"the run begins at place {i}, between the two stages of an interval: take an even place")
        return i


def check_one_grid(config: SamplerConfig) -> None:
    """Of the grids that are spaced in sigma one at most can be asked for, and what it needs must be there."""
    on = [key for key in GRIDS if config.own(key)]
    config.require(len(on) < 2, on[-1] if on else "", f"be false beside {on[0] if on else ''}: one grid at a time")
    if config.own("use_beta_sigmas"):
        _beta_quantiles(1)  # asks for scipy now, rather than in the middle of a run


def spaced_in_sigma(config: SamplerConfig, most: float, least: float, n: int) -> np.ndarray | None:
    """n levels from `most` to `least`, spaced as the config says; None if it leaves that to the timesteps."""
    if config.own("use_karras_sigmas"):
        return karras(most, least, n)
    if config.own("use_exponential_sigmas"):
        if least <= 0:
            raise ValueError(f"use_exponential_sigmas is true: its levels must be more than 0, but the last is {least}")
        return np.exp(np.linspace(math.log(most), math.log(least), n))
    if config.own("use_beta_sigmas"):
        return least + _beta_quantiles(n) * (most - least)
    return None


def karras(most: float, least: float, n: int, rho: float = 7.0) -> np.ndarray:
    """n levels, evenly spaced in sigma^(1/rho) (Elucidating the design space, arXiv 2206.00364, eq. 5)."""
    first, last = most ** (1 / rho), least ** (1 / rho)
    return (first + np.linspace(0, 1, n) * (last - first)) ** rho


def _beta_quantiles(n: int) -> np.ndarray:
    """n quantiles of Beta(0.6, 0.6), descending: more levels at both ends (Beta sampling, arXiv 2407.12173)."""
    try:
        from scipy.stats import beta  # large, and for this grid alone
    except ImportError:
        raise ImportError("use_beta_sigmas needs scipy: pip install scipy") from None
    return beta.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)


def ancestral(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """The deviation of the noise that an ancestral step ends with, and the level that it goes down to before.

    The first is that of DDPM's posterior, in the VE reading. The squares of both add up to sigma_next^2, so that the
    second is sigma_next^2 / sigma; the reference takes the difference, which leaves fewer digits in a long step.
    """
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    return up, (sigma_next**2 - up**2).clamp(min=0) ** 0.5  # it may round below 0


def descending(values: Sequence[float], name: str, least: float, count: int = 1) -> np.ndarray:
    """`values` as a float64 array. Raises an error that names them unless they are numbers in descending order."""
    try:
        array = np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a list of numbers, but is {values!r}") from None
    if len(array) < count or not np.isfinite(array).all() or (np.diff(array) >= 0).any() or array[-1] < least:
        raise ValueError(f"{name}={list(values)} must be in descending order, {least} or more, and at least {count}")
    return array
