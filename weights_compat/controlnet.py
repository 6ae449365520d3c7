"""ControlNetModel: the Hub's names, and ours."""

from .rules import Table, nested, same
from .unet import SPATIAL_TRANSFORMER, TIME_MLP, unet

CONTROLNET = Table(
    unet(SPATIAL_TRANSFORMER)
    + nested("add_embedding", "added_mlp", TIME_MLP)
    + nested("controlnet_cond_embedding", "control", same("conv_in", "blocks.{}", "conv_out"))
    + [("controlnet_down_blocks.{}", "out_down.{}"), ("controlnet_mid_block", "out_mid")]
)
