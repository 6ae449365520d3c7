"""Latents: the first noise, and the way from pictures to latents and back, which alone knows the VAE's scale."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensors
from ..models import AutoencoderKL
from ..noise import Generators, randn_tensor
from .memory import device_of

UPCAST = threading.RLock()  # held where a VAE, which threads share, may have another dtype than its own


class LatentsAs(NamedTuple):
    """What a pipeline reads of its VAE's config beside the `scaling_factor`."""

    upcast: bool = False  # `force_upcast`: the VAE computes in float32, where float16 would overflow
    normed: bool = False  # `latents_mean` and `latents_std`, one for each channel


PLAIN = LatentsAs()  # Stable Diffusion 1 and 2
XL = LatentsAs(upcast=True, normed=True)


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
    return first_noise(shape, generator, latents, device, dtype) * sigma


def first_noise(
    shape: tuple[int, ...], generator: Generators, latents: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Noise of deviation 1: drawn, or the `latents` given."""
    check_generators(generator, shape[0])
    if latents is None:
        return randn_tensor(shape, generator, device, dtype)
    check_tensors(latents=latents)
    if latents.shape != shape:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; these arguments need {shape}")
    return latents.to(device, dtype)


def check_pictures(name: str, given: Any, pictures: Tensor, vae: AutoencoderKL) -> Tensor:
    """`pictures` (n, C, H, W), made of the argument `given`, if they have the VAE's channels; tensors may be latents.

    Pictures with an alpha channel have as many channels as latents: the reference takes them for such.
    """
    channels, latent, sides = vae.config.in_channels, vae.config.latent_channels, min(pictures.shape[2:])
    first = given[0] if isinstance(given, list | tuple) else given
    if pictures.shape[1] == latent and isinstance(first, Tensor) and sides > 0:
        return pictures
    if pictures.shape[1] != channels or sides < vae.factor:
        raise ValueError(
            f"{name} has shape {tuple(pictures.shape)} as a tensor; it must have {channels} channels, or {latent} if it"
            f" is a tensor of latents, and sides of {vae.factor} pixels or more. PIL's gray and transparent pictures"
            ' get their colours by convert("RGB")'
        )
    return pictures


@contextmanager
def computing(vae: AutoencoderKL, latents_as: LatentsAs, half_alone: bool = False) -> Iterator[torch.dtype]:
    """Within, XL's VAE is in float32 if its config asks for that (with `half_alone`, only if it is in float16), and
    threads take turns, since it is the pipeline's. Gives its own dtype."""
    if not latents_as.upcast:
        yield vae.dtype
        return
    with UPCAST:
        dtype = vae.dtype
        upcast = vae.config.force_upcast and (dtype == torch.float16 or not half_alone)
        if upcast:
            vae.to(torch.float32)
        try:
            yield dtype
        finally:
            if upcast:
                vae.to(dtype)


def statistics(vae: AutoencoderKL, read: bool, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of the latents' channels, (1, C, 1, 1) each, where the VAE has both and they are `read`."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if not read or mean is None or std is None:
        return None
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def encode_pictures(
    vae: AutoencoderKL,
    pictures: Tensor,
    generator: Generators,
    device: torch.device,
    latents_as: LatentsAs = PLAIN,
) -> Tensor:
    """Pictures (n, C, H, W) in [-1, 1] -> a sample of their latents, scaled for the UNet. Latents come back as they
    are. Of a list of generators the first n draw."""
    if pictures.shape[1] == vae.config.latent_channels:
        return pictures.to(device)
    generator = generator[: len(pictures)] if isinstance(generator, list | tuple) else generator
    with computing(vae, latents_as) as dtype:
        encoded = vae.encode(pictures.to(device_of(vae), vae.dtype))
        # AutoencoderTiny has the latents themselves
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample(generator)
        latents = latents.to(device, dtype)
    known = statistics(vae, latents_as.normed, latents)
    if known is None:
        return latents * vae.config.scaling_factor
    return (latents - known[0]) * vae.config.scaling_factor / known[1]


def repeated(name: str, tensor: Tensor, count: int) -> Tensor:
    """(n, ...) -> (count, ...): all n again and again, as long as there are pictures to draw."""
    if count % len(tensor):
        raise ValueError(f"{name} holds {len(tensor)} for {count} pictures: give one, one each, or a divisor of that")
    return tensor.repeat(count // len(tensor), *[1] * (tensor.ndim - 1))


def picture_latents(
    vae: AutoencoderKL,
    pictures: Tensor,
    count: int,
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    latents_as: LatentsAs = PLAIN,
) -> Tensor:
    """`encode_pictures` for `count` pictures to draw, out of as many or fewer. One generator draws once for each
    picture given, a list of them once for each picture to draw."""
    check_generators(generator, count)
    if isinstance(generator, list | tuple):
        pictures = repeated("image", pictures, count)
    return repeated("image", encode_pictures(vae, pictures, generator, device, latents_as), count).to(dtype)


def decode_latents(vae: AutoencoderKL, latents: Tensor, device: torch.device, latents_as: LatentsAs = PLAIN) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], before any clamp. The VAE may have a dtype of its own."""
    with computing(vae, latents_as, half_alone=True):
        latents = latents.to(torch.float32) if vae.dtype == torch.float32 else latents
        known = statistics(vae, latents_as.normed, latents)
        if known is None:
            latents = latents / vae.config.scaling_factor
        else:
            latents = latents * known[1] / vae.config.scaling_factor + known[0]
        return vae.decode(latents.to(device_of(vae), vae.dtype)).sample
