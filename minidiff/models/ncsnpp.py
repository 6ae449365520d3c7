"""The levels of NCSN++ (Score-based generative modeling through stochastic differential equations, arXiv 2011.13456,
appendix H), built of the UNet's blocks.

Beside the features a picture goes down and up through the network, made smaller and larger by a filter that lets
nothing high through: on the way down it is added to the features, on the way up each level adds its part to it.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv2d
from .unet import PixelAttention, ResnetBlock, default_groups

if TYPE_CHECKING:
    from .unet_2d import UNet2DConfig, UNet2DModel

SCALE = 2**0.5  # divides the sum of a block's two paths, so that its variance stays
CHANNELS = 3  # of the picture
ATTENTION_GROUPS = 32


def filtered(x: Tensor, up: bool) -> Tensor:
    """Twice or half the height and width, filtered by 1, 3, 3, 1 in both directions (StyleGAN 2's filter)."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype)
    kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    B, C, H, W = x.shape
    x = x.reshape(B * C, 1, H, W)
    y = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1) if up else F.conv2d(x, kernel, stride=2, padding=1)
    return y.view(B, C, *y.shape[2:])


def halved(x: Tensor) -> Tensor:
    return filtered(x, up=False)


def doubled(x: Tensor) -> Tensor:
    return filtered(x, up=True)


def resnet(
    c: "UNet2DConfig", c_in: int, c_out: int, groups: int | None = None, resample: bool | None = None
) -> ResnetBlock:
    """`resample`: True is up, False is down; then the shortcut has a convolution too."""
    groups = groups or default_groups(c_in)
    fits = c_in % groups == 0 and c_out % default_groups(c_out) == 0
    c.require(fits, "block_out_channels", f"make {c_in} and {c_out} channels that norms of {groups} groups can share")
    block = ResnetBlock(
        c_in,
        c_out,
        groups,
        c.norm_eps,
        c.time_dim,
        groups_out=default_groups(c_out),
        scale_shift=c.resnet_time_scale_shift == "scale_shift",
        dropout=c.dropout,
        resample={None: None, False: halved, True: doubled}[resample],
        scale=SCALE,
    )
    if resample is not None:
        block.skip = Conv2d(c_in, c_out, 1)
    return block


def attention(c: "UNet2DConfig", channels: int) -> PixelAttention:
    c.require(
        channels % ATTENTION_GROUPS == 0, "block_out_channels", f"be multiples of {ATTENTION_GROUPS} for attention"
    )
    return PixelAttention(channels, channels // (c.attention_head_dim or channels), ATTENTION_GROUPS, c.norm_eps, SCALE)


class SkipDownBlock(nn.Module):
    """Residual blocks, attention after each where the level has it, then half the size, and the picture joins."""

    def __init__(self, c: "UNet2DConfig", c_in: int, c_out: int, attentive: bool, last: bool):
        super().__init__()
        layers = range(c.layers_per_block)
        self.resnets = nn.ModuleList(resnet(c, c_out if i else c_in, c_out) for i in layers)
        self.attentions = nn.ModuleList(attention(c, c_out) for _ in layers if attentive)
        self.resample = None if last else resnet(c, c_out, c_out, resample=False)
        self.from_image = None if last else Conv2d(CHANNELS, c_out, 1)

    def forward(self, x: Tensor, temb: Tensor, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Every intermediate result, the last one being the block's output; and the picture, half as large."""
        outputs = []
        for i, block in enumerate(self.resnets):
            x = block(x, temb)
            x = self.attentions[i](x) if self.attentions else x
            outputs.append(x)
        if self.resample is not None:
            image = halved(image)
            outputs.append(self.resample(x, temb) + self.from_image(image))
        return outputs, image


class SkipUpBlock(nn.Module):
    """Residual blocks, each with a skip connection; attention after the last; a part of the picture; twice the size."""

    def __init__(self, c: "UNet2DConfig", inputs: list[int], c_out: int, attentive: bool, last: bool):
        """`inputs`: channels of each residual block's input, with its skip connection."""
        super().__init__()
        # Beside attention the reference takes a quarter of the skip's channels alone, which makes 32 groups always
        groups = ATTENTION_GROUPS if attentive else None
        self.resnets = nn.ModuleList(resnet(c, c_in, c_out, groups) for c_in in inputs)
        self.attentions = nn.ModuleList([attention(c, c_out)] if attentive else [])
        self.to_image_norm = None if last else nn.GroupNorm(default_groups(c_out), c_out, c.norm_eps)
        self.to_image = None if last else Conv2d(c_out, CHANNELS, 3, padding=1)
        self.resample = None if last else resnet(c, c_out, c_out, resample=True)

    def forward(
        self, x: Tensor, skips: list[Tensor], temb: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for block, skip in zip(self.resnets, reversed(skips), strict=True):
            x = block(torch.cat([x, skip], dim=1), temb)
        for block in self.attentions:
            x = block(x)
        image = None if image is None else doubled(image)
        if self.resample is not None:
            part = self.to_image(F.silu(self.to_image_norm(x)))
            image = part if image is None else image + part
            x = self.resample(x, temb)
        return x, image


def check(c: "UNet2DConfig") -> None:
    """Raises a ConfigError for what the levels can't be built with."""
    for key in ("down_block_types", "up_block_types"):
        c.require(all("Skip" in kind for kind in c[key]), key, "be of one kind: all with Skip in their names, or none")
    for key in ("in_channels", "out_channels"):
        c.require(c[key] == CHANNELS, key, f"be {CHANNELS} beside blocks with Skip in their names")


def make_down(c: "UNet2DConfig") -> tuple[list[nn.Module], list[int]]:
    widths = c.block_out_channels
    last, downs, skips = len(widths) - 1, [], [widths[0]]
    for level, (kind, width) in enumerate(zip(c.down_block_types, widths, strict=True)):
        downs.append(SkipDownBlock(c, skips[-1], width, "Attn" in kind, level == last))
        skips += [width] * (c.layers_per_block + (level < last))
    return downs, skips


def make_up(c: "UNet2DConfig", skips: list[int]) -> list[nn.Module]:
    widths, ups = c.block_out_channels, []
    c_in = widths[-1]
    for level, kind in zip(range(len(widths) - 1, -1, -1), c.up_block_types, strict=True):
        inputs = []
        for _ in range(c.layers_per_block + 1):
            inputs.append(c_in + skips.pop())
            c_in = widths[level]
        ups.append(SkipUpBlock(c, inputs, c_in, "Attn" in kind, not level))
    return ups


def denoise(unet: "UNet2DModel", sample: Tensor, temb: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, H, W), as `UNet.denoise`, with the picture beside."""
    x, image = unet.conv_in(sample), sample
    skips = [x]
    for block in unet.down:
        made, image = unet.through(block, skips[-1], temb, image)
        skips += made
    x = skips[-1] if unet.mid is None else unet.through(unet.mid, skips[-1], temb)
    image = None
    for block in unet.up:
        n = len(block.resnets)
        skips, taken = skips[:-n], skips[-n:]
        x, image = unet.through(block, x, taken, temb, image)
    out = unet.conv_out(F.silu(unet.norm_out(x)))
    return out if image is None else out + image
