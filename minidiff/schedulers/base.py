"""What all samplers share: the noise schedule, the grid of timesteps, and the few formulas that need nothing else.

A scheduler knows no model. It is given a model's output at a timestep and says what the sample is at the one before.
`alpha_bar` is the papers' cumulative product of 1 - beta: a noisy sample is

    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps                              DDPM (arXiv 2006.11239), eq. 4

The tables are float32 and stay on the CPU, where a lookup waits for no other device. A timestep that lives elsewhere
has to be fetched from there, so a loop that must not wait passes Python integers to `step`.
"""

import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch

from ..config import MAX_WIDTH, Config, Configured, check_tensors

OTHER_SCHEDULERS_KEYS = """
    algorithm_type beta_end beta_schedule beta_start clip_sample clip_sample_range disable_corrector
    dynamic_thresholding_ratio euler_at_final final_sigmas_type flow_shift interpolation_type lambda_min_clipped
    lower_order_final noise_sampler_seed num_train_timesteps original_inference_steps predict_x0 prediction_type
    rescale_betas_zero_snr rho sample_max_value set_alpha_to_one shift_terminal sigma_data sigma_max sigma_min
    sigma_schedule skip_prk_steps solver_order solver_p solver_type steps_offset thresholding time_shift_type
    timestep_scaling timestep_spacing timestep_type trained_betas use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas variance_type
"""


@dataclass(frozen=True, eq=False)
class SchedulerConfig(Config):
    """The keys of every scheduler. Each adds its own, among them `prediction_type` and the two of the timestep grid."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None  # in place of the schedule; a longer list is used from its start

    inert: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(OTHER_SCHEDULERS_KEYS.split(), "another scheduler's; kept, so that swapping back restores it"),
        "tensor_format": "only in the Hub's oldest files, to choose between NumPy and PyTorch; no class reads it now",
        "timestep_values": "only in the Hub's oldest files, and null; no class reads it now",
    }

    def __post_init__(self):
        super().__post_init__()
        betas = self.trained_betas
        self.require_within(MAX_WIDTH, "num_train_timesteps")
        self.require(0 <= self.beta_start <= 1, "beta_start", "lie in 0..1")
        self.require(0 <= self.beta_end <= 1, "beta_end", "lie in 0..1")
        if betas is not None:
            self.require(all(0 <= beta <= 1 for beta in betas), "trained_betas", "lie in 0..1")
            self.require(len(betas) >= self.num_train_timesteps, "trained_betas", "have num_train_timesteps values")


class SchedulerOutput(NamedTuple):
    """What `step` returns: the sample at the previous timestep, in the shape and dtype of the sample given."""

    prev_sample: torch.Tensor


class Scheduler(Configured):
    """Base of all samplers. A run is `set_timesteps(n)`, then one `step` for each of `timesteps`.

    Attributes:
        betas, alphas, alphas_cumprod: float32 tables of `num_train_timesteps` values, by timestep.
        final_alpha_cumprod: the alpha_bar that stands before timestep 0.
        timesteps: int64, descending, on the device that `set_timesteps` was given.
        num_inference_steps: the `n` of `set_timesteps`, None before it.
        init_noise_sigma: what to scale the first noise by. order: model calls a step.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.betas = make_betas(self.config)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(self)).flip(0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample`: these samplers show the model what they hold. Others divide by the noise level first."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Samples x_t from x0, eq. 4: (B, ...) from (B, ...). `timesteps` (B,) are integers; one can stand for all."""
        check_tensors(original_samples=original_samples, noise=noise, timesteps=timesteps)
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar = self._noise_levels(timesteps, noise, original_samples)
        return sqrt_alpha_bar * original_samples + sqrt_one_minus_alpha_bar * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What a v_prediction model learns to say (arXiv 2202.00512, appendix D). Shapes as in `add_noise`."""
        check_tensors(sample=sample, noise=noise, timesteps=timesteps)
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar = self._noise_levels(timesteps, noise, sample)
        return sqrt_alpha_bar * noise - sqrt_one_minus_alpha_bar * sample

    def _noise_levels(
        self, timesteps: torch.Tensor, noise: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) in the sample's dtype, (B, 1, 1, ...) to broadcast over it."""
        timesteps = timesteps.flatten()
        if noise.shape[1:] != sample.shape[1:]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the samples {tuple(sample.shape)}")
        if timesteps.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"timesteps must be int64 or int32, but are {timesteps.dtype}")
        if len(timesteps) not in (1, len(sample)) and len(sample) != 1:
            raise ValueError(f"timesteps has {len(timesteps)} values for {len(sample)} samples")
        if timesteps.device.type == "cpu" and not all(0 <= t < len(self) for t in timesteps.tolist()):
            raise ValueError(f"timesteps must lie in 0..{len(self) - 1}, but are {timesteps.tolist()}")
        table = self.alphas_cumprod.to(timesteps.device, non_blocking=True)
        alpha_bar = table.gather(0, timesteps.long()).to(sample.device, sample.dtype)
        alpha_bar = alpha_bar.view(-1, *[1] * (sample.ndim - 1))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def _grid(self, num_inference_steps: int) -> np.ndarray:
        """The descending int64 timesteps, spaced as in table 2 of arXiv 2305.08891."""
        n, T = as_integer(num_inference_steps, "num_inference_steps"), len(self)
        if not 1 <= n <= T:
            raise ValueError(f"num_inference_steps={n} must lie in 1..{T}, the config's num_train_timesteps")
        spacing, offset = self.config.timestep_spacing, self.config.steps_offset
        if spacing == "linspace":
            grid = np.linspace(0, T - 1, n).round()[::-1]
        elif spacing == "leading":
            grid = np.arange(n)[::-1] * (T // n) + offset
        else:  # "trailing"
            grid = np.arange(T, 0, -T / n).round() - 1
        if grid.min() < 0 or grid.max() >= T:  # a float too many in trailing's arange, or the offset
            raise ValueError(
                f"num_inference_steps={n} with timestep_spacing={spacing!r} and steps_offset={offset} asks for "
                f"timesteps {grid.max():.0f}..{grid.min():.0f}, which leave 0..{T - 1}: take another number of steps"
            )
        return grid.astype(np.int64)

    def _check_step(self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor) -> int:
        """The timestep as an integer, once the arguments of `step` are known to fit."""
        check_tensors(model_output=model_output, sample=sample)
        if model_output.shape != sample.shape:
            given, needed = tuple(model_output.shape), tuple(sample.shape)
            raise ValueError(f"model_output has shape {given}, but sample {needed}: they must agree")
        if not (model_output.is_floating_point() and sample.is_floating_point()):
            given = f"{model_output.dtype} and {sample.dtype}"
            raise TypeError(f"model_output and sample must be floating-point tensors, but are {given}")
        t = as_integer(timestep, "timestep")
        if not 0 <= t < len(self):
            raise ValueError(f"timestep={t} must lie in 0..{len(self) - 1}")
        return t

    def _stride(self) -> int:
        """The distance of two timesteps, once `set_timesteps` has been called."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        return len(self) // self.num_inference_steps

    def _alpha_bar(self, t: int) -> torch.Tensor:
        """alpha_bar at a timestep, a float32 scalar on the CPU. Before timestep 0 stands `final_alpha_cumprod`."""
        if t >= len(self):
            raise ValueError(f"timestep={t} must lie in 0..{len(self) - 1}")
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod

    def _x0_and_eps(
        self, model_output: torch.Tensor, alpha_bar: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both readings of what the model said, whichever of the three `prediction_type`s it speaks.

        All solve eq. 4 above, and v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.
        """
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "epsilon":
            eps = model_output
            x0 = (sample - sqrt_one_minus_alpha_bar * eps) / sqrt_alpha_bar
        elif self.config.prediction_type == "sample":
            x0 = model_output
            eps = (sample - sqrt_alpha_bar * x0) / sqrt_one_minus_alpha_bar
        else:  # "v_prediction"
            x0 = sqrt_alpha_bar * sample - sqrt_one_minus_alpha_bar * model_output
            eps = sqrt_alpha_bar * model_output + sqrt_one_minus_alpha_bar * sample
        return x0, eps

    def _bound(self, x0: torch.Tensor) -> torch.Tensor:
        """Keeps the predicted x0 where pictures live, if the config says so."""
        config = self.config
        if config.thresholding:
            # Imagen (arXiv 2205.11487, section 2.3): saturated pictures are scaled back into [-1, 1], not cut off.
            pixels = x0.flatten(1) if x0.dtype == torch.float64 else x0.flatten(1).float()
            limit = torch.quantile(pixels.abs(), config.dynamic_thresholding_ratio, dim=1, keepdim=True)
            limit = limit.clamp(min=1, max=config.sample_max_value)  # (B, 1)
            return (pixels.clamp(-limit, limit) / limit).view(x0.shape).to(x0.dtype)
        if config.clip_sample:
            return x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return x0


def make_betas(config: SchedulerConfig) -> torch.Tensor:
    """The schedule's float32 table of betas, of `num_train_timesteps` values."""
    T, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":  # DDPM, section 4
        betas = torch.linspace(start, end, T, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float32) ** 2
    elif config.beta_schedule == "sigmoid":  # GeoDiff
        betas = torch.linspace(-6, 6, T, dtype=torch.float32).sigmoid() * (end - start) + start
    elif config.beta_schedule == "laplace":
        betas = betas_from_alpha_bar(laplace_alpha_bar, T)
    else:  # "squaredcos_cap_v2": Improved DDPM (arXiv 2102.09672), eq. 17
        betas = betas_from_alpha_bar(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, T)
    own_keys = vars(config)  # PNDM may hold another scheduler's rescale_betas_zero_snr, and doesn't read it
    return rescale_zero_terminal_snr(betas) if own_keys.get("rescale_betas_zero_snr") else betas


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_train_timesteps: int) -> torch.Tensor:
    """The betas whose cumulative product follows `alpha_bar`, a function of time in 0..1; none exceeds 0.999."""
    times = [i / num_train_timesteps for i in range(num_train_timesteps + 1)]
    betas = [min(1 - alpha_bar(t_next) / alpha_bar(t), 0.999) for t, t_next in pairwise(times)]
    return torch.tensor(betas, dtype=torch.float32)


def laplace_alpha_bar(t: float) -> float:
    """Log SNR drawn from a Laplace distribution (arXiv 2407.03297), as the reference has it, with its outer root."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(alpha_bar) to keep its first value and end at 0 (arXiv 2305.08891, algorithm 1)."""
    sqrt_alpha_bar = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0].clone(), sqrt_alpha_bar[-1].clone()
    alpha_bar = ((sqrt_alpha_bar - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def as_integer(value, name: str) -> int:
    """`value` as an int: it may be one, NumPy's, or a tensor of one integer. A TypeError names the argument."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but is {value!r}") from None


def check_number(value, name: str, least: float = -math.inf) -> None:
    """Raises a TypeError or a ValueError that names the argument unless it is a finite number, `least` or more."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but is {value!r}")
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}={value} must be finite, and {least} or more")


def to_device(timesteps: Sequence[int] | np.ndarray, device: torch.device | str | None) -> torch.Tensor:
    """`timesteps` as int64 on `device`, by default the CPU. Raises ValueError for a device that torch hasn't."""
    try:
        return torch.as_tensor(timesteps, device=device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not supported: {error}") from None
