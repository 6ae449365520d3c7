"""Latents: the first noise, and the way from pictures to latents and back, which alone knows the VAE's scale."""

import torch
from torch import Tensor

from ..loading.component import check_tensors
from ..models import AutoencoderKL
from ..noise import Generators, randn_tensor


def check_generators(generator: Generators, count: int) -> None:
    if isinstance(generator, list | tuple) and len(generator) != count:
        raise ValueError(f"generator has {len(generator)} entries for {count} pictures: give one, or one each")


def first_latents(
    shape: tuple[int, ...],
    generator: Generators,
    latents: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    sigma: float | Tensor,
) -> Tensor:
    """Noise of the scheduler's first deviation `sigma`: drawn, or the `latents` given."""
    check_generators(generator, shape[0])
    if latents is None:
        latents = randn_tensor(shape, generator, device, dtype)
    check_tensors(latents=latents)
    if latents.shape != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; these arguments need {shape}")
    return latents.to(device, dtype) * sigma


def decode_latents(vae: AutoencoderKL, latents: Tensor, device: torch.device) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], before any clamp. The VAE may have a dtype of its own."""
    return vae.decode((latents / vae.config.scaling_factor).to(device, vae.dtype)).sample
