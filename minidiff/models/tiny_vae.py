"""AutoencoderTiny: Stable Diffusion's latents to pictures in an instant (TAESD, github.com/madebyollin/taesd).

A distilled VAE without norms and attention, a hundredth of the size, for previews, or in place of the VAE. Its latents
are scaled for the UNet already, so that its `scaling_factor` is 1.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.vae import AUTOENCODER_TINY

from ..layers import Conv2d
from ..loading.config import MAX_LEVELS, Config, Width
from ..noise import Generators
from ..outputs import output
from .tiling import in_pasted_tiles
from .vae import InParts

Layers = tuple[Width, ...]


@output
class TinyEncoderOutput(NamedTuple):
    """`latents` (B, latent_channels, h, w): the very latents, and no distribution over them."""

    latents: Tensor


@output
class TinyDecoderOutput(NamedTuple):
    """`sample` (B, out_channels, H, W)."""

    sample: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TinyConfig(Config):
    """The keys of AutoencoderTiny; those that real checkpoints hold at one value stand at the file's foot."""

    in_channels: Width = 3
    out_channels: Width = 3
    encoder_block_out_channels: Layers = (64, 64, 64, 64)
    decoder_block_out_channels: Layers = (64, 64, 64, 64)
    act_fn: Literal["relu", "silu"] = "relu"
    latent_channels: Width = 4
    num_encoder_blocks: Layers = (1, 3, 3, 3)
    num_decoder_blocks: Layers = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0

    def __post_init__(self):
        super().__post_init__()
        for side in ("encoder", "decoder"):
            widths, key = self[f"{side}_block_out_channels"], f"num_{side}_blocks"
            self.require(0 < len(widths) <= MAX_LEVELS, f"{side}_block_out_channels", f"name 1 to {MAX_LEVELS} levels")
            self.require(len(self[key]) == len(widths), key, f"have {len(widths)} numbers, one for each level")
            # No convolution between levels changes the width
            self.require(len({*widths}) == 1, f"{side}_block_out_channels", "be the same at every level")
        self.require(self.scaling_factor != 0, "scaling_factor", "not be zero")


class TinyBlock(nn.Module):
    """Three convolutions with a shortcut."""

    def __init__(self, channels: int, act: type[nn.Module]):
        super().__init__()
        layers = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], act(), layers[1], act(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    def __init__(self, c: TinyConfig):
        super().__init__()
        width, act = c.encoder_block_out_channels[0], ACTIVATIONS[c.act_fn]
        layers: list[nn.Module] = []
        for i, blocks in enumerate(c.num_encoder_blocks):
            half = Conv2d(width, width, 3, stride=2, padding=1, bias=False)
            layers += [half if i else Conv2d(c.in_channels, width, 3, padding=1)]
            layers += [TinyBlock(width, act) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, Conv2d(width, c.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    def __init__(self, c: TinyConfig):
        super().__init__()
        width, act = c.decoder_block_out_channels[0], ACTIVATIONS[c.act_fn]
        layers: list[nn.Module] = [Conv2d(c.latent_channels, width, 3, padding=1), act()]
        for i, blocks in enumerate(c.num_decoder_blocks):
            layers += [TinyBlock(width, act) for _ in range(blocks)]
            if i + 1 < len(c.num_decoder_blocks):
                layers += [nn.Upsample(scale_factor=2), Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Conv2d(width, c.out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x / 3).tanh() * 3) * 2 - 1  # latents beyond 3 are squeezed


class AutoencoderTiny(InParts):
    """`encode` gives latents, `decode` a picture. Pictures are in [-1, 1] here."""

    Config = TinyConfig
    table = AUTOENCODER_TINY
    tile_overlap_factor = 0.125
    tile_sample_min_size = 512

    def build(self, c: TinyConfig) -> None:
        self.tile_latent_min_size = self.tile_sample_min_size // self.factor
        self.encoder = TinyEncoder(c)
        self.decoder = TinyDecoder(c)

    @property
    def factor(self) -> int:
        """How many pixels a latent number spans, in height and in width."""
        return 2 ** (len(self.config.decoder_block_out_channels) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> TinyEncoderOutput | tuple[Tensor]:
        """Picture (B, in_channels, H, W) -> `.latents` (B, latent_channels, H / factor, W / factor)."""
        self._check(x, "x", self.config.in_channels)
        sizes = {"size": self.tile_sample_min_size, "overlap": self.tile_overlap_factor, "scale": 1 / self.factor}
        latents = self.in_parts(partial(self.through, self.encoder), x, partial(in_pasted_tiles, **sizes), most=0)
        return TinyEncoderOutput(latents) if return_dict else (latents,)

    def decode(
        self, x: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> TinyDecoderOutput | tuple[Tensor]:
        """Latents (B, latent_channels, h, w) -> `.sample` (B, out_channels, h * factor, w * factor).

        `generator` has its place in the reference's signature; this decoder draws nothing.
        """
        self._check(x, "x", self.config.latent_channels)
        sizes = {"size": self.tile_latent_min_size, "overlap": self.tile_overlap_factor, "scale": self.factor}
        picture = self.in_parts(partial(self.through, self.decoder), x, partial(in_pasted_tiles, **sizes), most=0)
        return TinyDecoderOutput(picture) if return_dict else (picture,)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents -> [0, 1], as they can be kept in a PNG."""
        return (x / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """The way back."""
        return (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def forward(self, sample: Tensor, return_dict: bool = True) -> TinyDecoderOutput | tuple[Tensor]:
        """Through the encoder and back, the latents rounded to bytes in between."""
        bytes_ = (self.scale_latents(self.encode(sample).latents) * 255).round()
        return self.decode(self.unscale_latents(bytes_ / 255), return_dict=return_dict)


ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}

# Keys that real checkpoints hold at one value alone
TinyConfig.fixed = {"upsample_fn": "nearest", "upsampling_scaling_factor": 2, "force_upcast": False}
TinyConfig.inert = {"block_out_channels": "the reference notes decoder_block_out_channels by this name too"}
