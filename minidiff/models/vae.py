"""AutoencoderKL: pictures to latents and back (High-resolution image synthesis with latent diffusion models, 3.1).

A picture of 512 x 512 x 3 numbers becomes latents of 64 x 64 x 4, in which the UNet works. Built from the UNet's own
blocks, without timesteps and without skip connections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.vae import AUTOENCODER_KL

from ..layers import Conv2d
from ..loading.config import MAX_LEVELS, Config, Depth, Width
from ..loading.model import Model
from ..loading.single_file import OneFile
from ..noise import Generators, randn_tensor
from ..outputs import output
from .tiling import Network, in_tiles
from .unet import AVERAGED, Downsample, MidBlock, PixelAttention, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm here; the UNet's residual blocks have 1e-5


Through = Callable[[nn.Module, Tensor], Tensor]  # calls a level: as it is, or checkpointed


def call(level: nn.Module, x: Tensor) -> Tensor:
    return level(x)


class Level(nn.Module):
    """Residual blocks. `resample`, to half or twice the size, is called after the level: its input, which the caller
    holds, is let go by then."""

    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, resample: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out, groups, EPS) for i in range(depth))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


def middle(channels: int, groups: int, with_attention: bool) -> MidBlock:
    resnets = [ResnetBlock(channels, channels, groups, EPS) for _ in range(2)]
    return MidBlock(resnets, [PixelAttention(channels, 1, groups, EPS)] if with_attention else [])


class Encoder(nn.Module):
    """Picture (B, in_channels, H, W) -> what is said of its latents, (B, c_out, h, w)."""

    def __init__(self, c: "AutoencoderBase", c_out: int):
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            down = Downsample(width, padding=0) if i < len(widths) - 1 else nn.Identity()
            self.down.append(Level(widths[max(i - 1, 0)], width, c.layers_per_block, groups, down))
        self.mid = middle(widths[-1], groups, c.mid_block_add_attention)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor, through: Through = call) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = through(level, x)
            x = through(level.resample, x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """Latents (B, latent_channels, h, w) -> picture (B, out_channels, H, W)."""

    def __init__(self, c: "AutoencoderBase"):
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups, c.mid_block_add_attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            up = Upsample(width) if i < len(widths) - 1 else nn.Identity()
            self.up.append(Level(widths[max(i - 1, 0)], width, c.layers_per_block + 1, groups, up))
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor, through: Through = call) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = through(level, x)
            x = through(level.resample, x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class DiagonalGaussianDistribution:
    """What the encoder says of a picture: each latent number's mean and variance (Auto-encoding variational Bayes)."""

    def __init__(self, parameters: Tensor):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, generator: Generators = None) -> Tensor:
        return self.mean + self.std * randn_tensor(self.mean.shape, generator, self.mean.device, self.mean.dtype)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal, (B,) (Auto-encoding variational Bayes, appendix B).

        float32 at least: a sum over all latents is beyond the 65504 of float16.
        """
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


@output
class EncoderOutput(NamedTuple):
    latent_dist: DiagonalGaussianDistribution


@output
class DecoderOutput(NamedTuple):
    sample: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoencoderBase(Config):
    """The keys that AutoencoderKL and VQModel have."""

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[Width, ...] = (64,)
    layers_per_block: Depth = 1
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215  # the pipelines multiply latents by it, so that the UNet sees a variance near 1
    mid_block_add_attention: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(self.scaling_factor != 0, "scaling_factor", "not be zero")
        widths, groups = self.block_out_channels, self.norm_num_groups
        self.require(0 < len(widths) <= MAX_LEVELS, "block_out_channels", f"name 1 to {MAX_LEVELS} levels")
        fits = all(c % groups == 0 for c in widths)
        self.require(fits, "block_out_channels", f"hold multiples of norm_num_groups={groups}")
        for key in ("down_block_types", "up_block_types"):
            self.require(len(self[key]) == len(widths), key, f"name {len(widths)} blocks, as block_out_channels does")


@dataclass(frozen=True, eq=False, kw_only=True)
class AutoencoderConfig(AutoencoderBase):
    """The keys of AutoencoderKL; those that real checkpoints hold at one value stand at the file's foot."""

    shift_factor: float | None = None  # no Stable Diffusion 1, 2 or XL has one; their pipelines don't read it
    force_upcast: bool = True  # read by the XL pipeline: this VAE overflows in float16
    latents_mean: tuple[float, ...] | None = None  # one for each channel: XL's pipelines norm latents by them, if there
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self):
        super().__post_init__()
        for key in ("latents_mean", "latents_std"):
            fits = self[key] is None or len(self[key]) == self.latent_channels
            self.require(fits, key, f"have {self.latent_channels} numbers, one for each of latent_channels")


class Autoencoder(Model, abstract=True):
    """What all autoencoders share: how far latents span, and what is asked of pictures and latents."""

    @property
    def factor(self) -> int:
        """How many pixels a latent number spans, in height and in width."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _check(self, x: Tensor, name: str, channels: int) -> None:
        self.check_inputs(**{name: x})
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
            takes = f"this {type(self).__name__} takes (batch, {channels}, h, w)"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; {takes}")


class InParts(Autoencoder, abstract=True):
    """Less memory: `enable_slicing` takes one picture of a batch after another, `enable_tiling` one tile (see
    tiling.py). A tile is `tile_sample_min_size` pixels or `tile_latent_min_size` latents wide and high."""

    use_slicing = use_tiling = False
    tile_overlap_factor: ClassVar[float]

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def in_parts(self, network: Network, x: Tensor, tiled: Callable[[Network, Tensor], Tensor], most: int) -> Tensor:
        """`network(x)`; `tiled(network, x)` where that is asked for and a side is longer than `most`."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([self.in_parts(network, one, tiled, most) for one in x.split(1)])
        return tiled(network, x) if self.use_tiling and max(x.shape[2:]) > most else network(x)


class AutoencoderKL(InParts, OneFile):
    """`encode` gives a distribution over latents, `decode` a picture. Pictures are in [-1, 1] here.

    The latents come as the encoder makes them; pipelines apply `config.scaling_factor`.
    """

    Config = AutoencoderConfig
    table, part = AUTOENCODER_KL, "vae"
    tile_overlap_factor = 0.25

    def build(self, c: AutoencoderConfig) -> None:
        self.encoder = Encoder(c, 2 * c.latent_channels)  # mean and log variance
        self.decoder = Decoder(c)
        n = c.latent_channels
        self.quant_conv = Conv2d(2 * n, 2 * n, 1) if c.use_quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(n, n, 1) if c.use_post_quant_conv else nn.Identity()
        self.tile_sample_min_size = c.sample_size[0] if isinstance(c.sample_size, tuple) else c.sample_size
        self.tile_latent_min_size = self.tile_sample_min_size // self.factor

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[DiagonalGaussianDistribution]:
        """Picture (B, in_channels, H, W) -> `.latent_dist` over (B, latent_channels, H / factor, W / factor)."""
        self._check(x, "x", self.config.in_channels)
        H, W = x.shape[2:]
        if H % self.factor or W % self.factor:
            fits = f"{H - H % self.factor} x {W - W % self.factor}"
            raise ValueError(
                f"x has shape {tuple(x.shape)}; height and width must be multiples of {self.factor}. Crop or resize it,"
                f" to {fits} for example (VaeImageProcessor does that)"
            )
        sizes = self.tile_sample_min_size, self.tile_latent_min_size
        tiled = partial(in_tiles, sizes=sizes, overlap=self.tile_overlap_factor, scale=1 / self.factor)
        moments = self.in_parts(lambda part: self.quant_conv(self.encoder(part, self.through)), x, tiled, sizes[0])
        posterior = DiagonalGaussianDistribution(moments)
        return EncoderOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, latent_channels, h, w) -> `.sample` (B, out_channels, h * factor, w * factor).

        `generator` has its place in the reference's signature; this decoder draws nothing.
        """
        self._check(z, "z", self.config.latent_channels)
        sizes = self.tile_latent_min_size, self.tile_sample_min_size
        tiled = partial(in_tiles, sizes=sizes, overlap=self.tile_overlap_factor, scale=self.factor)
        picture = self.in_parts(lambda part: self.decoder(self.post_quant_conv(part), self.through), z, tiled, sizes[0])
        return DecoderOutput(picture) if return_dict else (picture,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Through the encoder and back: from a sample of the latents, or from their mode."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)


# Keys that real checkpoints hold at one value alone
AutoencoderConfig.inert = AVERAGED
AutoencoderConfig.fixed = {"act_fn": "silu"}
