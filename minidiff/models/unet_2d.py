"""UNet2DModel: the denoiser of pictures without text (Denoising diffusion probabilistic models, appendix B), built of
the other UNet's blocks. Its attention is over pixels alone; it may be told a class.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.unet import UNET_2D

from ..loading.config import Width
from . import ncsnpp
from .unet import (
    AVERAGED,
    Downsample,
    MidBlock,
    PixelAttention,
    ResnetBlock,
    UNet,
    UNetConfig,
    UNetOutput,
    Upsample,
    default_groups,
)

DOWN_KINDS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP_KINDS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")


@dataclass(frozen=True, eq=False, kw_only=True)
class UNet2DConfig(UNetConfig):
    """The keys of UNet2DModel."""

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[Literal[*DOWN_KINDS], ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[Literal[*UP_KINDS], ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[Width, ...] = (224, 448, 672, 896)
    norm_num_groups: Width | None = 32  # None, in NCSN++: a quarter of the channels, at most 32
    time_embedding_type: Literal["positional", "fourier"] = "positional"  # the second for noise levels: NCSN++
    mid_block_scale_factor: float = 1  # divides what the middle's blocks give
    downsample_type: Literal["conv", "resnet"] = "conv"  # of the levels with attention; others say it in their name
    upsample_type: Literal["conv", "resnet"] = "conv"
    mid_block_type: Literal["UNetMidBlock2D", None] = "UNetMidBlock2D"
    attention_head_dim: Width | None = 8  # channels of a head; None: one head
    add_attention: bool = True  # in the middle
    attn_norm_num_groups: Width | None = None  # there too; None: as the other norms, or with scale_shift no norm
    class_embed_type: Literal["timestep", "identity", None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.progressive:
            ncsnpp.check(self)
        given = self.norm_num_groups is not None or self.progressive
        self.require(given, "norm_num_groups", "be given, but for NCSN++ (SkipDownBlock2D, SkipUpBlock2D, ...)")
        self.require(self.mid_block_scale_factor != 0, "mid_block_scale_factor", "not be zero")
        groups, last = self.attn_norm_num_groups or 1, self.block_out_channels[-1]
        self.require(last % groups == 0, "attn_norm_num_groups", f"divide the last of block_out_channels, {last}")
        width, levels = self.attention_head_dim, self.attending(self.add_attention and bool(self.mid_block_type))
        fits = width is None or all(self.block_out_channels[level] % width == 0 for level in levels)
        self.require(fits, "attention_head_dim", "divide the block_out_channels of every level with attention")

    @property
    def progressive(self) -> bool:
        """Whether the picture itself is carried along, at every size: NCSN++."""
        return any("Skip" in kind for kind in (*self.down_block_types, *self.up_block_types))


class Fourier(nn.Module):
    """Noise levels (B,) as waves of their logarithms, (B, 2 * dim), at frequencies that were drawn once and are never
    trained (NCSN++, arXiv 2011.13456, appendix H)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim) * 16, requires_grad=False)

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma.log()[:, None] * self.weight[None] * 2 * torch.pi
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def halved(x: Tensor) -> Tensor:
    """Half the height and width: the mean of four pixels."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Twice the height and width: each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class UNet2DModel(UNet):
    """Predicts the noise in a picture (Denoising diffusion probabilistic models, appendix B)."""

    Config = UNet2DConfig
    table = UNET_2D

    def build(self, c: UNet2DConfig) -> None:
        super().build(c)
        if c.time_embedding_type == "fourier":
            self.fourier = Fourier(c.block_out_channels[0])

    def make_attention(self, level: int, layer: int, up: bool = False) -> PixelAttention:
        c = self.config
        channels = c.block_out_channels[level]
        return PixelAttention(channels, channels // (c.attention_head_dim or channels), c.norm_num_groups, c.norm_eps)

    def make_down(self) -> tuple[list[nn.Module], list[int]]:
        return ncsnpp.make_down(self.config) if self.config.progressive else super().make_down()

    def make_up(self, skips: list[int]) -> list[nn.Module]:
        return ncsnpp.make_up(self.config, skips) if self.config.progressive else super().make_up(skips)

    def make_middle(self, level: int) -> MidBlock:
        c, channels = self.config, self.config.block_out_channels[level]
        groups, scale = c.norm_num_groups or default_groups(channels), c.mid_block_scale_factor
        scale_shift = c.resnet_time_scale_shift == "scale_shift"
        options = {"scale_shift": scale_shift, "dropout": c.dropout, "scale": scale}
        resnets = [ResnetBlock(channels, channels, groups, c.norm_eps, c.time_dim, **options) for _ in range(2)]
        if not c.add_attention:
            return MidBlock(resnets, [])
        heads, attn_groups = channels // (c.attention_head_dim or channels), None if scale_shift else groups
        attn_groups = c.attn_norm_num_groups or attn_groups
        return MidBlock(resnets, [PixelAttention(channels, heads, attn_groups, c.norm_eps, scale)])

    def make_downsample(self, kind: str, width: int) -> Downsample | ResnetBlock:
        if kind.startswith("Resnet") or ("Attn" in kind and self.config.downsample_type == "resnet"):
            return self.make_resnet(width, width, halved)
        return super().make_downsample(kind, width)

    def make_upsample(self, kind: str, width: int) -> Upsample | ResnetBlock:
        if kind.startswith("Resnet") or ("Attn" in kind and self.config.upsample_type == "resnet"):
            return self.make_resnet(width, width, doubled)
        return super().make_upsample(kind, width)

    @property
    def waves_dim(self) -> int:
        return super().waves_dim * (2 if self.config.time_embedding_type == "fourier" else 1)

    def waves(self, t: Tensor) -> Tensor:
        return self.fourier(t) if self.config.time_embedding_type == "fourier" else super().waves(t)

    def denoise(self, sample: Tensor, temb: Tensor, context: None = None) -> Tensor:
        return ncsnpp.denoise(self, sample, temb) if self.config.progressive else super().denoise(sample, temb)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNetOutput | tuple[Tensor]:
        """`sample` (B, in_channels, H, W) at `timestep`, () or (B,) -> `.sample` (B, out_channels, H, W).

        `timestep` may be a number too; a compiled network is compiled anew for each of those, but not for tensors.

        H and W must be multiples of 2 ** (levels - 1), for the skip connections to meet. `class_labels`, where the
        UNet has classes: (B,), their numbers; with class_embed_type "identity" (B, time_dim), vectors.
        """
        self.check(sample)
        if any(side % self.factor for side in sample.shape[2:]):
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; height and width must be multiples of {self.factor}"
            )
        out = self.denoise(sample, self.embed_timestep(sample, timestep) + self.embed_class(sample, class_labels))
        if self.config.time_embedding_type == "fourier":  # the timestep is the noise level, and `out` the score's
            out = out / torch.as_tensor(timestep, device=out.device).to(out.dtype).view(-1, 1, 1, 1)
        return UNetOutput(out) if return_dict else (out,)


# Keys that real checkpoints hold at one value alone
UNet2DConfig.fixed = UNetConfig.fixed
UNet2DConfig.inert = AVERAGED | {"num_train_timesteps": "documents the training; the network doesn't read it"}
