"""The denoiser of Stable Diffusion, UNet2DConditionModel, and every block that UNets are made of; see also unet_2d.py.

A UNet predicts the noise in a noisy picture. It goes down (fewer pixels, more channels), through a middle, and up
again, and each step up also sees what the step down at the same size had made: the skip connections. The timestep
enters every residual block; the text, where there is one, enters through cross-attention.

Read from top to bottom: small blocks first, the models last. B is the batch, C channels, H and W pixels, L tokens.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.unet import UNET_2D_CONDITION

from ..layers import Conv2d, Linear, Prepared, attention, gated
from ..loading.config import MAX_LEVELS, Config, Depth, Share, Width
from ..loading.model import Model
from ..loading.single_file import OneFile
from ..outputs import output


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Timesteps (B,) as waves of `dim` / 2 frequencies, (B, dim), float32 (Attention is all you need, 3.5).

    Stable Diffusion has cosines first (`flip_sin_to_cos`) and frequencies 10000^(-i / half); the models of the
    DDPM paper have sines first and, with `freq_shift` 1, frequencies that end exactly at 1 / 10000.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * exponent.exp()  # (B, half)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)


def add(x: Tensor, residual: Tensor) -> Tensor:
    """`x` (B, C, H, W) and what another network adds to it: one number for each pixel, or (B, C, 1, 1) for all."""
    if residual.ndim != 4 or any(n not in (1, m) for n, m in zip(residual.shape, x.shape, strict=True)):
        raise ValueError(f"a residual has shape {tuple(residual.shape)}, which can't be added to {tuple(x.shape)}")
    return x + residual


def default_groups(channels: int) -> int:
    """Of a norm, where the config doesn't say: NCSN++'s rule."""
    return max(min(channels // 4, 32), 1)


class TimeMLP(nn.Module):
    """Turns the waves of `timestep_embedding` into what the residual blocks read.

    With `cond_dim` more may join the waves: the guidance scale, in latent consistency models.
    """

    def __init__(self, dim_in: int, dim: int, cond_dim: int | None = None):
        super().__init__()
        self.cond = Linear(cond_dim, dim_in, bias=False) if cond_dim else None
        self.fc1 = Linear(dim_in, dim)
        self.fc2 = Linear(dim, dim)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        x = x if cond is None else x + self.cond(cond)
        return self.fc2(F.silu(self.fc1(x)))


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut; the timestep comes between them. Without `time_dim` (VAE) it doesn't.

    The timestep is added, or with `scale_shift` it stretches and shifts what is normed (Diffusion models beat GANs on
    image synthesis, arXiv 2105.05233, section 3). `resample` changes the size on both paths; `scale` divides their sum.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        groups: int,
        eps: float,
        time_dim: int | None = None,
        *,
        groups_out: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.scale_shift, self.resample, self.scale = scale_shift, resample, scale
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.time_proj = Linear(time_dim, 2 * c_out if scale_shift else c_out) if time_dim else None
        self.norm2 = nn.GroupNorm(groups_out or groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(x), inplace=True)
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)  # (B, c_in, H, W) -> (B, c_out, H, W)
        t = None if self.time_proj is None else self.time_proj(F.silu(temb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = t.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if t is None else h + t)
        h = self.conv2(self.dropout(F.silu(h, inplace=True)))
        h = self.skip(x) + h
        return h if self.scale == 1 else h / self.scale


class Downsample(nn.Module):
    """Half the height and width by a strided convolution.

    With `padding` 0 one row and one column are added at the bottom and right only: the VAE and the DDPM paper's
    models were trained so, and symmetric padding would shift their output by a pixel.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:  # a residual block in its place reads temb
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat each pixel, then a convolution. Twice the size, or `size`, which may be one pixel less than twice."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        H, W = x.shape[-2:]
        return self.conv(F.interpolate(x, size=size or (2 * H, 2 * W), mode="nearest"))


class Attention(Prepared, nn.Module):
    """Tokens (B, L, dim) look at `context` (B, S, context_dim), or at each other where there is no context."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, bias=bias)
        self.k = Linear(context_dim or dim, dim, bias=bias)
        self.v = Linear(context_dim or dim, dim, bias=bias)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.out(attention(self.q(x), self.k(context), self.v(context), self.heads, mask, self.quick))


class PixelAttention(Attention):
    """Self-attention over the pixels of a feature map: the DDPM paper's block, which the VAE has too.

    Without `groups` there is no norm; `scale` divides the sum of both paths.
    """

    def __init__(self, channels: int, heads: int, groups: int | None, eps: float, scale: float = 1.0):
        super().__init__(channels, heads, bias=True)
        self.norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()
        self.scale = scale

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        tokens = self.norm(x.flatten(2)).transpose(1, 2)  # (B, C, H, W) -> (B, C, H*W) -> (B, H*W, C)
        h = super().forward(tokens).transpose(1, 2).reshape(x.shape) + x
        return h if self.scale == 1 else h / self.scale


class FeedForward(nn.Module):
    """GEGLU (GLU variants improve transformer, eq. 5): half of the hidden units gate the other half."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = Linear(dim, 8 * dim)
        self.proj_out = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(gated(self.proj_in, x))


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the text; with `only_cross` at the text twice (the x4 upscaler)."""

    def __init__(self, dim: int, heads: int, context_dim: int, only_cross: bool = False):
        super().__init__()
        self.only_cross = only_cross
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads, context_dim if only_cross else None)
        self.cross_norm = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads, context_dim)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attention(self.self_norm(x), context if self.only_cross else None)
        x = x + self.cross_attention(self.cross_norm(x), context)
        return x + self.ff(self.ff_norm(x))


class SpatialTransformer(nn.Module):
    """A transformer over pixels that reads the text (High-resolution image synthesis with latent diffusion, 3.3)."""

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        groups: int,
        linear: bool,
        only_cross: bool = False,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # A 1x1 convolution and a linear layer over tokens are the same map: SD 1 has the first, SD 2 and XL the second
        self.linear = linear
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim, only_cross) for _ in range(depth))
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(x.shape)
        return x + (h if self.linear else self.proj_out(h))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, attention after each where the level has it, then half the size."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[nn.Module], downsample: Downsample | ResnetBlock | None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)  # empty, or one for each resnet
        self.downsample = downsample

    def forward(self, x: Tensor, temb: Tensor | None = None, context: Tensor | None = None) -> list[Tensor]:
        """Returns every intermediate result, for the skip connections; the last one is the block's output."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x, temb))
        return outputs


class MidBlock(nn.Module):
    """The middle, where pixels are fewest: residual block, attention, residual block; or the first of them alone."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, temb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, temb)
        for transformer in self.attentions:
            x = transformer(x, context)
        for resnet in self.resnets[1:]:
            x = resnet(x, temb)
        return x


class UpBlock(nn.Module):
    """One level on the way up: each residual block first takes one skip connection, the last one first."""

    def __init__(
        self, resnets: list[ResnetBlock], attentions: list[nn.Module], upsample: Upsample | ResnetBlock | None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)  # empty, or one for each resnet
        self.upsample = upsample

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        temb: Tensor,
        context: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """`skips`: one for each resnet. `size`: to go up to; an odd one is a pixel less than twice the present."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), temb)  # (B, C + C_skip, H, W) -> (B, C, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)
        if isinstance(self.upsample, ResnetBlock):  # twice the size always: UNet2DModel takes no odd ones
            return self.upsample(x, temb)
        return x if self.upsample is None else self.upsample(x, size)


@output
class UNetOutput(NamedTuple):
    """`sample`: what the network predicts, (B, out_channels, H, W)."""

    sample: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class UNetConfig(Config):
    """The keys that both networks have; those that real checkpoints hold at one value stand at the file's foot."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[Width, ...]
    layers_per_block: Depth = 2
    downsample_padding: Literal[0, 1] = 1
    norm_num_groups: Width = 32
    norm_eps: float = 1e-5
    dropout: Share = 0.0  # in training alone
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    time_embedding_dim: Width | None = None  # None: four times the first level's channels
    mid_block_type: str | None  # None: there is no middle (BK-SDM)
    class_embed_type: str | None = None  # what class_labels are: "timestep" numbers, "identity" or "projection" vectors
    num_class_embeds: Width | None = None  # read without a class_embed_type: a vector for each class

    def __post_init__(self):
        super().__post_init__()
        levels, groups = len(self.block_out_channels), self.norm_num_groups or 1
        self.require(0 < levels <= MAX_LEVELS, "block_out_channels", f"name 1 to {MAX_LEVELS} levels")
        fits = all(c % 2 == 0 and c % groups == 0 for c in self.block_out_channels)
        self.require(fits, "block_out_channels", f"hold even multiples of norm_num_groups={groups}")
        waves = self.block_out_channels[0] // 2  # timestep_embedding divides by their number less freq_shift
        self.require(0 <= self.freq_shift < waves, "freq_shift", f"lie in 0..{waves - 1}")
        for key in ("down_block_types", "up_block_types"):
            kinds = self.get(key, self.down_block_types)  # a ControlNet has no way up
            self.require(len(kinds) == levels, key, f"name {levels} blocks, one for each of block_out_channels")

    @property
    def time_dim(self) -> int:
        """Of what the residual blocks read of the timestep."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def temb_dim(self) -> int:
        """Of all that they read: AudioLDM's have the class beside the timestep, and not added to it."""
        return 2 * self.time_dim if self.get("class_embeddings_concat") else self.time_dim

    def per_level(self, key: str) -> tuple[Any, ...]:
        """A key that is one value for all levels, or a list with one for each."""
        levels = len(self.block_out_channels)
        value = getattr(self, key)
        values = value if isinstance(value, tuple) else (value,) * levels
        self.require(len(values) == levels, key, f"have {levels} values, one for each of block_out_channels")
        return values

    def attending(self, middle: bool = True) -> set[int]:
        """The levels with attention, on either way; the middle is of the last level's width."""
        kinds = (*enumerate(self.down_block_types), *enumerate(reversed(self.up_block_types)))
        last = {len(self.block_out_channels) - 1} if middle else set()
        return {level for level, kind in kinds if "Attn" in kind} | last


@dataclass(frozen=True, eq=False, kw_only=True)
class UNet2DConditionConfig(UNetConfig):
    """The keys of UNet2DConditionModel. Its defaults are Stable Diffusion 1's, but for cross_attention_dim."""

    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...] = (
        *["CrossAttnDownBlock2D"] * 3,
        "DownBlock2D",
    )
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    block_out_channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    layers_per_block: Depth | tuple[Depth, ...] = 2
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None] = "UNetMidBlock2DCrossAttn"
    cross_attention_dim: Width | tuple[Width, ...] = 1280
    # By level, and within a level by layer (SSD-1B); on the way up then as in `reverse_...`, the lowest level first
    transformer_layers_per_block: Depth | tuple[Depth | tuple[Depth, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth | tuple[Depth, ...], ...] | None = None
    attention_head_dim: Width | tuple[Width, ...] = 8  # the NUMBER of heads: an old misnomer that checkpoints keep
    only_cross_attention: bool | tuple[bool, ...] = False  # by level: pixels don't look at each other
    use_linear_projection: bool = False
    # SD 2.1 asks for attention in float32. Here, as in the reference, scaled_dot_product_attention is taken all the
    # same: its softmax runs in float32 inside
    upcast_attention: bool | None = False
    addition_embed_type: Literal["text_time", None] = None  # XL: pooled text, sizes and crops join the timestep
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    class_embed_type: Literal["timestep", "identity", "projection", "simple_projection", None] = None
    class_embeddings_concat: bool = False
    time_cond_proj_dim: Width | None = None  # latent consistency models: waves of the guidance scale

    def __post_init__(self):
        super().__post_init__()
        self.per_level("cross_attention_dim")
        self.per_level("only_cross_attention")
        layers, nested = self.per_level("layers_per_block"), False
        for key, more in (("transformer_layers_per_block", 0), ("reverse_transformer_layers_per_block", 1)):
            for depths, count in zip(self.per_level(key), layers[::-1] if more else layers, strict=True):
                fits = not isinstance(depths, tuple) or len(depths) == count + more
                self.require(fits, key, "have a number for each layer of a level (and on the way up one more)")
                nested |= isinstance(depths, tuple)
        given = not nested or self.reverse_transformer_layers_per_block is not None
        self.require(given, "reverse_transformer_layers_per_block", "be given where depths differ within a level")
        heads, widths = self.per_level("attention_head_dim"), self.block_out_channels
        levels = self.attending(self.mid_block_type == "UNetMidBlock2DCrossAttn")
        fits = all(widths[level] % heads[level] == 0 for level in levels)
        self.require(fits, "attention_head_dim", "divide block_out_channels level by level: it is the number of heads")
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            fits = self.addition_embed_type is None or 2 * self.freq_shift < (self[key] or 0) <= 2**20
            self.require(fits, key, f'lie between 2 * freq_shift and {2**20}, for addition_embed_type="text_time"')
        projected = self.class_embed_type in ("projection", "simple_projection")
        fits = not projected or 0 < (self.projection_class_embeddings_input_dim or 0) <= 2**20
        self.require(fits, "projection_class_embeddings_input_dim", "be given, for this class_embed_type")
        classes = (self.class_embed_type or self.num_class_embeds) and self.addition_embed_type is None
        fits = not self.class_embeddings_concat or classes
        self.require(fits, "class_embeddings_concat", "be false without classes, and beside an addition_embed_type")

    def depth(self, level: int, layer: int, up: bool) -> int:
        """How many transformer blocks come after a layer."""
        depths = self.per_level("transformer_layers_per_block")
        if up and self.reverse_transformer_layers_per_block is not None:
            depths = self.reverse_transformer_layers_per_block[::-1]
        return depths[level][layer] if isinstance(depths[level], tuple) else depths[level]


class UNet(Model, abstract=True):
    """What both networks share: the whole path from noisy sample to predicted noise. Subclasses name the attention."""

    def build(self, c: UNetConfig) -> None:
        widths = c.block_out_channels
        self.conv_in = Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_mlp = TimeMLP(self.waves_dim, c.time_dim, c.get("time_cond_proj_dim"))
        self.class_embedding = self.make_class_embedding()
        self.mid = None if c.mid_block_type is None else self.make_middle(len(widths) - 1)
        downs, skips = self.make_down()
        self.down = nn.ModuleList(downs)
        self.build_up(c, skips)

    def build_up(self, c: UNetConfig, skips: list[int]) -> None:
        """What comes after the middle. `skips`: the channels of every skip connection."""
        widths, groups = c.block_out_channels, c.norm_num_groups or default_groups(c.block_out_channels[0])
        self.up = nn.ModuleList(self.make_up(skips))
        self.norm_out = nn.GroupNorm(groups, widths[0], c.norm_eps)
        self.conv_out = Conv2d(widths[0], c.out_channels, 3, padding=1)

    def make_down(self) -> tuple[list[nn.Module], list[int]]:
        """All levels on the way down; and the channels of every skip connection, in the order of their making."""
        c, downs = self.config, []
        widths, layers = c.block_out_channels, c.per_level("layers_per_block")
        last = len(widths) - 1
        skips = [widths[0]]
        for level, (kind, width) in enumerate(zip(c.down_block_types, widths, strict=True)):
            resnets, attentions = [], []
            for i in range(layers[level]):
                resnets.append(self.make_resnet(width if i else skips[-1], width))
                if "Attn" in kind:
                    attentions.append(self.make_attention(level, i))
                skips.append(width)
            downsample = self.make_downsample(kind, width) if level < last else None
            skips += [width] if level < last else []
            downs.append(DownBlock(resnets, attentions, downsample))
        return downs, skips

    def make_up(self, skips: list[int]) -> list[nn.Module]:
        """All levels on the way up."""
        c, ups = self.config, []
        widths, layers = c.block_out_channels, c.per_level("layers_per_block")
        c_in = widths[-1]
        for level, kind in zip(range(len(widths) - 1, -1, -1), c.up_block_types, strict=True):
            resnets, attentions = [], []
            for i in range(layers[level] + 1):  # one more than on the way down: for the level's input
                resnets.append(self.make_resnet(c_in + skips.pop(), widths[level]))
                if "Attn" in kind:
                    attentions.append(self.make_attention(level, i, up=True))
                c_in = widths[level]
            ups.append(UpBlock(resnets, attentions, self.make_upsample(kind, c_in) if level else None))
        return ups

    def make_resnet(self, c_in: int, c_out: int, resample: Callable[[Tensor], Tensor] | None = None) -> ResnetBlock:
        c = self.config
        scale_shift = c.resnet_time_scale_shift == "scale_shift"
        options = {"scale_shift": scale_shift, "dropout": c.dropout, "resample": resample}
        return ResnetBlock(c_in, c_out, c.norm_num_groups, c.norm_eps, c.temb_dim, **options)

    def make_class_embedding(self) -> nn.Module | None:
        c = self.config
        if c.class_embed_type is None:
            return nn.Embedding(c.num_class_embeds, c.time_dim) if c.num_class_embeds else None
        makes: dict[str, Callable[[], nn.Module]] = {
            "timestep": lambda: TimeMLP(self.waves_dim, c.time_dim),
            "identity": nn.Identity,
            "projection": lambda: TimeMLP(c.projection_class_embeddings_input_dim, c.time_dim),
            "simple_projection": lambda: Linear(c.projection_class_embeddings_input_dim, c.time_dim),
        }
        return makes[c.class_embed_type]()

    def make_attention(self, level: int, layer: int, up: bool = False) -> nn.Module:
        """The attention of one level: over pixels in UNet2DModel, a transformer that reads text in the other."""
        raise NotImplementedError

    def make_middle(self, level: int) -> MidBlock:
        raise NotImplementedError

    def make_downsample(self, kind: str, width: int) -> Downsample | ResnetBlock:
        return Downsample(width, self.config.downsample_padding)

    def make_upsample(self, kind: str, width: int) -> Upsample | ResnetBlock:
        return Upsample(width)

    @property
    def waves_dim(self) -> int:
        """Of what `waves` gives."""
        return self.config.block_out_channels[0]

    @property
    def factor(self) -> int:
        """How many pixels of the sample one in the middle spans, in height and in width."""
        return 2 ** (len(self.down) - 1)

    def waves(self, t: Tensor) -> Tensor:
        """Timesteps (B,) as waves, float32."""
        c = self.config
        return timestep_embedding(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)

    def embed_timestep(self, sample: Tensor, timestep: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """(B, time_dim): one timestep for all samples, or one for each."""
        if not isinstance(timestep, Tensor | numbers.Real):
            raise TypeError(f"timestep must be a number or a tensor, but is {timestep!r}")
        t = torch.as_tensor(timestep, device=sample.device)
        B = sample.shape[0]  # `len` would fix the number of samples where the network is exported
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, B)):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; it must be one number or one for each sample")
        t = t.reshape(-1).expand(B)
        return self.time_mlp(self.waves(t).to(sample.dtype), cond)  # waves are float32; the network may not be

    def embed_class(self, sample: Tensor, class_labels: Tensor | None) -> Tensor | float:
        """(B, time_dim) of what each sample should be: a class, a number, or a vector. Else 0."""
        c, B = self.config, sample.shape[0]
        if (class_labels is None) != (self.class_embedding is None):
            wants = "none, for this UNet has no classes"
            wants = wants if self.class_embedding is None else "one for each sample: this UNet has classes"
            raise ValueError(f"class_labels must be {wants}")
        if class_labels is None:
            return 0.0
        labels, dim = torch.as_tensor(class_labels, device=sample.device), c.time_dim
        if c.class_embed_type in ("projection", "simple_projection"):
            dim = c.projection_class_embeddings_input_dim
        shape = (B,) if c.class_embed_type in (None, "timestep") else (B, dim)
        if labels.shape != shape:
            raise ValueError(f"class_labels has shape {tuple(labels.shape)}, not {shape}")
        if c.class_embed_type is None:
            return self.class_embedding(labels)
        return self.class_embedding((self.waves(labels) if labels.ndim == 1 else labels).to(sample.dtype))

    def descend(self, x: Tensor, temb: Tensor, context: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """What conv_in makes -> every skip connection, and what comes out of the middle."""
        skips = [x]
        for block in self.down:
            skips += self.through(block, skips[-1], temb, context)
        return skips, skips[-1] if self.mid is None else self.through(self.mid, skips[-1], temb, context)

    def denoise(
        self,
        sample: Tensor,
        temb: Tensor,
        context: Tensor | None = None,
        residuals: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W). `residuals` are added to the skips, and in the middle."""
        skips, x = self.descend(self.conv_in(sample), temb, context)
        if residuals is not None:
            skips, x = [add(*pair) for pair in zip(skips, residuals[0], strict=True)], add(x, residuals[1])
        for block in self.up:
            n = len(block.resnets)
            skips, taken = skips[:-n], skips[-n:]
            size = skips[-1].shape[-2:] if skips else None  # of the level above: it may be odd
            x = self.through(block, x, taken, temb, context, size)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))

    def check(self, sample: Tensor) -> None:
        self.check_inputs(sample=sample)
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or 0 in sample.shape:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this {type(self).__name__} takes"
                f" (batch, {self.config.in_channels}, height, width)"
            )
        # With symmetric padding one pixel can be halved again and again
        if not self.config.downsample_padding and min(sample.shape[2:]) < self.factor:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; height and width must be at least {self.factor}")


class ConditionUNet(UNet, abstract=True):
    """What UNet2DConditionModel shares with ControlNetModel: attention that reads text, and what joins the timestep."""

    def build(self, c: UNet2DConditionConfig) -> None:
        super().build(c)
        if c.addition_embed_type == "text_time":
            self.added_mlp = TimeMLP(c.projection_class_embeddings_input_dim, c.time_dim)

    def make_attention(self, level: int, layer: int, up: bool = False, middle: bool = False) -> SpatialTransformer:
        c, depth = self.config, self.config.depth(level, layer, up)
        heads, context_dim = (c.per_level(key)[level] for key in ("attention_head_dim", "cross_attention_dim"))
        width, groups = c.block_out_channels[level], c.norm_num_groups
        only_cross = c.per_level("only_cross_attention")[level] and not middle  # which the reference leaves out
        return SpatialTransformer(width, heads, depth, context_dim, groups, c.use_linear_projection, only_cross)

    def make_middle(self, level: int) -> MidBlock:
        attentive = self.config.mid_block_type == "UNetMidBlock2DCrossAttn"  # else one residual block is all
        width = self.config.block_out_channels[level]
        resnets = [self.make_resnet(width, width) for _ in range(2 if attentive else 1)]
        return MidBlock(resnets, [self.make_attention(level, 0, middle=True)] if attentive else [])

    def check_states(self, sample: Tensor, states: Tensor | None) -> None:
        dims = self.config.per_level("cross_attention_dim")
        if states is None:
            if dims != self.config.block_out_channels:
                raise ValueError(f"encoder_hidden_states is None; this UNet takes (batch, length, {dims[0]})")
            return
        self.check_inputs(encoder_hidden_states=states)
        B = sample.shape[0]
        if states.ndim != 3 or states.shape[0] != B or {states.shape[-1]} != {*dims}:
            dim = dims[0] if len({*dims}) == 1 else f"{dims} by level: so it takes None alone"
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(states.shape)}; this UNet takes ({B}, length, {dim})"
            )

    def embed_added(self, sample: Tensor, added: dict[str, Tensor] | None) -> Tensor:
        """XL (SDXL, 2.2): the pooled text state, and the six numbers of original size, crop and target size."""
        c = self.config
        if not added or {"text_embeds", "time_ids"} - added.keys():
            raise ValueError("added_cond_kwargs must hold text_embeds (batch, n) and time_ids (batch, 6) for this UNet")
        waves = timestep_embedding(
            added["time_ids"].flatten(), c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift
        ).reshape(sample.shape[0], -1)  # (B * 6, n) -> (B, 6 * n)
        joined = torch.cat([added["text_embeds"], waves.to(added["text_embeds"].dtype)], dim=-1)
        if joined.shape[-1] != c.projection_class_embeddings_input_dim:
            raise ValueError(
                f"added_cond_kwargs makes {joined.shape[-1]} numbers a sample; this UNet takes"
                f" {c.projection_class_embeddings_input_dim}"
            )
        return self.added_mlp(joined.to(sample.dtype))

    def embed(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        states: Tensor | None,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added_cond_kwargs: dict[str, Tensor] | None,
        others: dict[str, None],
    ) -> Tensor:
        """Checks what `forward` is given, and makes of it what the residual blocks read, (B, time_dim)."""
        self.check(sample)
        for name, value in others.items():
            if name not in REFUSED:
                raise TypeError(f"{name} is no argument of {type(self).__name__}")
            if value is not None:
                raise ValueError(f"{name} must be None: {REFUSED[name]}")
        self.check_states(sample, states)
        if timestep_cond is not None:
            self.check_inputs(timestep_cond=timestep_cond)
            dim = self.config.time_cond_proj_dim
            if dim is None or timestep_cond.shape != (sample.shape[0], dim):
                takes = "none, since it has no time_cond_proj_dim" if dim is None else (sample.shape[0], dim)
                raise ValueError(f"timestep_cond has shape {tuple(timestep_cond.shape)}; this UNet takes {takes}")
        temb, label = self.embed_timestep(sample, timestep, timestep_cond), self.embed_class(sample, class_labels)
        temb = torch.cat([temb, label], dim=-1) if self.config.class_embeddings_concat else temb + label
        if self.config.addition_embed_type == "text_time":
            temb = temb + self.embed_added(sample, added_cond_kwargs)
        elif added_cond_kwargs:
            raise ValueError("added_cond_kwargs was given, but this UNet has no addition_embed_type: leave it out")
        return temb


class UNet2DConditionModel(ConditionUNet, OneFile):
    """Predicts the noise in latents, given text states (High-resolution image synthesis with latent diffusion, 3.3).

    SD 1.x, SD 2.x, inpainting (9 input channels: latents, mask, masked picture) and, with `text_time`, SD XL.
    """

    Config = UNet2DConditionConfig
    table, part = UNET_2D_CONDITION, "unet"

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        *,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: None,
    ) -> UNetOutput | tuple[Tensor]:
        """`sample` (B, in_channels, H, W) at `timestep`, () or (B,), with `encoder_hidden_states`
        (B, L, cross_attention_dim) -> `.sample` (B, out_channels, H, W), any H and W. The states may be None where
        cross_attention_dim is that of every level's pixels: they look at one another once more.

        `timestep` may be a number too; a compiled network is compiled anew for each of those, but not for tensors.
        `class_labels`, where the UNet has classes: (B,), or (B, n) where they are vectors.
        `timestep_cond` (latent consistency models alone): (B, time_cond_proj_dim).
        `added_cond_kwargs` (XL alone): `text_embeds` (B, n) and `time_ids` (B, 6).
        `down_block_additional_residuals`, `mid_block_additional_residual`: a ControlNet's, which are added to every
        skip connection and to what comes out of the middle. `others`: arguments of the reference that must be None
        here; an error says why.
        """
        states, down, mid = encoder_hidden_states, down_block_additional_residuals, mid_block_additional_residual
        temb = self.embed(sample, timestep, states, class_labels, timestep_cond, added_cond_kwargs, others)
        if (down is None) != (mid is None):
            raise ValueError("down_block_additional_residuals and mid_block_additional_residual go together")
        count = 1 + sum(len(block.resnets) + (block.downsample is not None) for block in self.down)
        if down is not None and len(down) != count:
            raise ValueError(f"down_block_additional_residuals are {len(down)}; this UNet has {count} skip connections")
        out = self.denoise(sample, temb, states, None if down is None else (down, mid))
        return UNetOutput(out) if return_dict else (out,)


# Keys that real checkpoints hold at one value alone

# What the training scripts' averaged copies (`EMAModel`) note in their config.json
AVERAGED = dict.fromkeys(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"),
    "documents how the weights were averaged",
)

UNetConfig.fixed = {
    "center_input_sample": False,
    "act_fn": "silu",
}

UNet2DConditionConfig.fixed = UNetConfig.fixed | {
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "num_attention_heads": None,
    "mid_block_only_cross_attention": Literal[None, False],
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
UNet2DConditionConfig.inert = AVERAGED | {
    "addition_embed_type_num_heads": 'read for an addition_embed_type of "text" alone',
}

# Arguments of the reference's UNet2DConditionModel that do nothing here
REFUSED = {
    "attention_mask": "it hides pixels from one another, which no pipeline of Stable Diffusion does",
    "encoder_attention_mask": "the UNets were trained on states that see the padding; shorten the states",
    "cross_attention_kwargs": "there are no attention processors; LoRA's scale is set by minidiff.lora.scaled",
    "down_intrablock_additional_residuals": "they are a T2I-Adapter's, which this UNet doesn't take",
}
