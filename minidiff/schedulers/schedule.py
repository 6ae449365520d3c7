"""Noise schedules: how much of a picture is left at each timestep of the training.

`alpha_bar` is the papers' cumulative product of 1 - beta. One noise level has two readings:

    VP    x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps      DDPM (arXiv 2006.11239), eq. 4: the variance is kept
    VE    x = x0 + sigma eps,  sigma = sqrt((1 - alpha_bar) / alpha_bar)       EDM (arXiv 2206.00364): it grows

The second is the first divided by sqrt(alpha_bar). All tables are float32, as the reference's.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def make_betas(schedule: str, T: int, start: float, end: float, trained: Sequence[float] | None = None) -> torch.Tensor:
    """The float32 table of a schedule's betas, (T,). `trained` ones stand in place of the schedule."""
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float32)
    if schedule == "linear":  # DDPM, section 4
        return torch.linspace(start, end, T, dtype=torch.float32)
    if schedule == "scaled_linear":  # latent diffusion: linear in sqrt(beta)
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float32) ** 2
    if schedule == "sigmoid":  # GeoDiff
        return torch.linspace(-6, 6, T, dtype=torch.float32).sigmoid() * (end - start) + start
    return betas_from_alpha_bar(ALPHA_BARS[schedule], T)


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], T: int) -> Tensor:
    """The betas whose cumulative product follows `alpha_bar`, a function of time in 0..1; none exceeds 0.999."""
    times = [i / T for i in range(T + 1)]
    betas = [min(1 - alpha_bar(t_next) / alpha_bar(t), 0.999) for t, t_next in pairwise(times)]
    return torch.tensor(betas, dtype=torch.float32)


def _laplace(t: float) -> float:
    """Log SNR drawn from a Laplace distribution (arXiv 2407.03297), as the reference has it, with its outer root."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,  # arXiv 2102.09672, eq. 17
    "exp": lambda t: math.exp(t * -12.0),
    "laplace": _laplace,
}


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shifts and scales sqrt(alpha_bar) to keep its first value and end at 0 (arXiv 2305.08891, algorithm 1)."""
    sqrt_alpha_bar = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0].clone(), sqrt_alpha_bar[-1].clone()
    alpha_bar = ((sqrt_alpha_bar - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def ve_sigmas(alpha_bar: Tensor) -> Tensor:
    """The noise level in the VE reading."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def vp_level(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the VP reading, x = alpha x0 + sigma eps, from the sigma of the VE reading."""
    alpha = 1 / (sigma**2 + 1) ** 0.5
    return alpha, sigma * alpha
