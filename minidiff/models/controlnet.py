"""ControlNetModel: a second network that steers a UNet by a picture of edges, depth, a pose, ... (ControlNet, Adding
conditional control to text-to-image diffusion models, arXiv 2302.05543).

It is a copy of the UNet's way down and middle, which sees the control picture too. What comes out of each block goes
through a 1x1 convolution that begins at zero, and is added to the UNet's own: at first it changes nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.controlnet import CONTROLNET

from ..layers import Conv2d
from ..loading.component import Component
from ..loading.config import MAX_LEVELS, LoadError, Range, Width
from ..loading.single_file import OneFile
from ..loading.weights import Files
from ..outputs import output
from .unet import ConditionUNet, UNet2DConditionConfig, UNet2DConditionModel


@output
class ControlNetOutput(NamedTuple):
    """`down_block_res_samples`: what is added to each of the UNet's skip connections; `mid_block_res_sample`: what is
    added in its middle."""

    down_block_res_samples: list[Tensor]
    mid_block_res_sample: Tensor


class ControlEmbedding(nn.Module):
    """The control picture, at the latents' size: half the height and width by each width but the first."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int):
        super().__init__()
        self.factor = 2 ** (len(widths) - 1)
        self.conv_in = Conv2d(c_in, widths[0], 3, padding=1)
        pairs = [((a, a, 1), (a, b, 2)) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList(Conv2d(a, b, 3, stride, padding=1) for pair in pairs for a, b, stride in pair)
        self.conv_out = zero(Conv2d(widths[-1], c_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


def zero(layer: Conv2d) -> Conv2d:
    """`layer`, whose output is zero until it is trained: its weight's gradient isn't, for its input isn't zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlNetConfig(UNet2DConditionConfig):
    """The keys of a UNet's way down and middle, and those of the control picture."""

    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] = "UNetMidBlock2DCrossAttn"
    # XL's small nets have no transformers: 0 on the levels without attention
    transformer_layers_per_block: Annotated[int, Range(0, 100)] | tuple[Annotated[int, Range(0, 100)], ...] = 1
    conditioning_channels: Width = 3
    conditioning_embedding_out_channels: tuple[Width, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False  # what is added is the same for all pixels ("shuffle")
    # What a UNet has besides
    sample_size: ClassVar[None] = None
    out_channels: ClassVar[None] = None
    up_block_types: ClassVar[tuple] = ()
    reverse_transformer_layers_per_block: ClassVar[None] = None
    time_embedding_dim: ClassVar[None] = None
    time_cond_proj_dim: ClassVar[None] = None
    class_embeddings_concat: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0

    def __post_init__(self):
        super().__post_init__()
        levels = len(self.conditioning_embedding_out_channels)
        self.require(0 < levels <= MAX_LEVELS, "conditioning_embedding_out_channels", f"name 1 to {MAX_LEVELS} levels")


# Keys that real checkpoints hold at one value alone
ControlNetConfig.fixed = {
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "num_attention_heads": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
}


class ControlNetModel(ConditionUNet, OneFile):
    """For SD 1.x, 2.x and, with `text_time`, XL."""

    Config = ControlNetConfig
    table, part = CONTROLNET, "controlnet"

    def build_up(self, c: ControlNetConfig, skips: list[int]) -> None:
        self.control = ControlEmbedding(
            c.conditioning_channels, c.conditioning_embedding_out_channels, c.block_out_channels[0]
        )
        self.out_down = nn.ModuleList(zero(Conv2d(channels, channels, 1)) for channels in skips)
        self.out_mid = zero(Conv2d(skips[-1], skips[-1], 1))

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> Self:
        """A net to train, for `unet`: with its config, and copies of its weights. At first it adds nothing.

        Raises ValueError for a UNet with a part that no ControlNet has.
        """
        for key in ("time_embedding_dim", "time_cond_proj_dim", "class_embeddings_concat"):
            if unet.config[key]:
                raise ValueError(f"unet has {key}={unet.config[key]}, which a ControlNet hasn't")
        net = cls(
            **{key: value for key, value in unet.config.items() if key in cls.Config.known()},
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )
        if load_weights_from_unet:
            own, theirs = net.state_dict(), unet.state_dict()
            net.load_state_dict({name: theirs.get(name, tensor) for name, tensor in own.items()})
        return net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        *,
        timestep_cond: None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: None,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """What the UNet is told, times `conditioning_scale`. `controlnet_cond`: the control picture, (B, channels,
        8 H, 8 W) in [0, 1] for `sample` (B, in_channels, H, W). The other arguments are the UNet's.

        `guess_mode`: the less, the earlier in the net: from a tenth up to all (ControlNet's "guess mode").
        """
        c, control, states = self.config, controlnet_cond, encoder_hidden_states
        temb = self.embed(sample, timestep, states, class_labels, timestep_cond, added_cond_kwargs, others)
        self.check_inputs(controlnet_cond=control)
        sides = tuple(-(-side // self.control.factor) for side in control.shape[2:])
        if control.shape[1:2] != (c.conditioning_channels,) or sides != sample.shape[2:]:
            sides = " x ".join(str(self.control.factor * side) for side in sample.shape[2:])
            raise ValueError(
                f"controlnet_cond has shape {tuple(control.shape)}; beside this sample it must be"
                f" ({sample.shape[0]}, {c.conditioning_channels}, {sides})"
            )
        control = control.flip(1) if c.controlnet_conditioning_channel_order == "bgr" else control
        x = self.conv_in(sample) + self.control(control)  # (B, c, H, W)
        skips, mid = self.descend(x, temb, states)
        made = [out(skip) for out, skip in zip((*self.out_down, self.out_mid), (*skips, mid), strict=True)]
        if guess_mode and not c.global_pool_conditions:
            scales = torch.logspace(-1, 0, len(made), device=sample.device) * conditioning_scale
            made = [one * scale for one, scale in zip(made, scales, strict=True)]
        else:
            made = [one * conditioning_scale for one in made]
        if c.global_pool_conditions:
            made = [one.mean((2, 3), keepdim=True) for one in made]
        result = ControlNetOutput(made[:-1], made[-1])
        return result if return_dict else tuple(result)


class MultiControlNetModel(Component, nn.Module):
    """Several nets at once, whose residuals are added up: what a pipeline makes of a list of them."""

    def __init__(self, controlnets: Sequence[ControlNetModel]):
        super().__init__()
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        *,
        return_dict: bool = True,
        **others: Any,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """As `ControlNetModel`; of control pictures and scales it takes one for each net."""
        given = zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
        made = [net(sample, timestep, encoder_hidden_states, *own, **others) for net, *own in given]
        downs = [sum(each[1:], each[0]) for each in zip(*(one[0] for one in made), strict=True)]
        result = ControlNetOutput(downs, sum((one[1] for one in made[1:]), made[0][1]))
        return result if return_dict else tuple(result)

    def parts(self, folder: Path) -> dict[Path, Component]:
        if (after := _place(folder, len(self.nets))).exists():
            raise ValueError(f"{after} would be loaded as one net more than the {len(self.nets)} there are: remove it")
        return {_place(folder, i): net for i, net in enumerate(self.nets)}

    @classmethod
    def read_from(cls, folder: Path, files: Files) -> Self:
        places = takewhile(Path.is_dir, (_place(folder, i) for i in count()))
        if not (nets := [ControlNetModel.read_from(place, files) for place in places]):
            raise LoadError(f"{folder}: no such folder")
        return cls(nets)

    def save_pretrained(self, save_directory: str | os.PathLike, **keywords: Any) -> None:
        """Each net in a folder of its own: `save_directory`, and beside it `save_directory`_1, ..."""
        for place, net in self.parts(Path(save_directory)).items():
            net.save_pretrained(place, **keywords)


def _place(folder: Path, i: int) -> Path:
    return folder.with_name(f"{folder.name}_{i}") if i else folder
