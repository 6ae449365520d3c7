"""UNet2DModel and UNet2DConditionModel: the Hub's names, and ours."""

from .rules import Table, nested, same

RESNET = [
    *same("norm1", "conv1", "norm2", "conv2"),
    ("time_emb_proj", "time_proj"),
    ("conv_shortcut", "skip"),
]

ATTENTION = [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")]

PIXEL_ATTENTION = [("group_norm", "norm"), *ATTENTION]

# What folders from 2022 call the attention of UNet2DModel and of the VAE
PIXEL_ATTENTION_2022 = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]

SPATIAL_TRANSFORMER = [
    *same("norm", "proj_in", "proj_out"),
    ("transformer_blocks.{}.norm1", "blocks.{}.self_norm"),
    *nested("transformer_blocks.{}.attn1", "blocks.{}.self_attention", ATTENTION),
    ("transformer_blocks.{}.norm2", "blocks.{}.cross_norm"),
    *nested("transformer_blocks.{}.attn2", "blocks.{}.cross_attention", ATTENTION),
    ("transformer_blocks.{}.norm3", "blocks.{}.ff_norm"),
    ("transformer_blocks.{}.ff.net.0.proj", "blocks.{}.ff.proj_in"),
    ("transformer_blocks.{}.ff.net.2", "blocks.{}.ff.proj_out"),
]

TIME_MLP = [("linear_1", "fc1"), ("linear_2", "fc2"), ("cond_proj", "cond")]

PLACES = [("down_blocks.{}", "down.{}"), ("mid_block", "mid"), ("up_blocks.{}", "up.{}")]


def unet(attention: list[tuple[str, str]]) -> list[tuple[str, str]]:
    rows = same("conv_in", "conv_out")
    rows += [("conv_norm_out", "norm_out")]
    rows += nested("time_embedding", "time_mlp", TIME_MLP)
    rows += [*same("class_embedding"), *nested("class_embedding", "class_embedding", TIME_MLP)]
    for hub, ours in PLACES:
        rows += nested(f"{hub}.resnets.{{}}", f"{ours}.resnets.{{}}", RESNET)
        rows += nested(f"{hub}.attentions.{{}}", f"{ours}.attentions.{{}}", attention)
    for hub, ours in (
        ("down_blocks.{}.downsamplers.0", "down.{}.downsample"),
        ("up_blocks.{}.upsamplers.0", "up.{}.upsample"),
    ):
        rows += nested(hub, ours, [*same("conv"), *RESNET])
    return rows


def pixel_attention_2022(places: list[str]) -> list[tuple[str, str]]:
    return [row for place in places for row in nested(place, place, PIXEL_ATTENTION_2022)]


NCSNPP = [
    ("time_proj", "fourier"),
    *nested("down_blocks.{}.resnet_down", "down.{}.resample", RESNET),
    ("down_blocks.{}.skip_conv", "down.{}.from_image"),
    *nested("up_blocks.{}.resnet_up", "up.{}.resample", RESNET),
    ("up_blocks.{}.skip_norm", "up.{}.to_image_norm"),
    ("up_blocks.{}.skip_conv", "up.{}.to_image"),
]

UNET_2D = Table(
    unet(PIXEL_ATTENTION) + NCSNPP,
    aliases=pixel_attention_2022([f"{hub}.attentions.{{}}" for hub, _ in PLACES]),
)

UNET_2D_CONDITION = Table(unet(SPATIAL_TRANSFORMER) + nested("add_embedding", "added_mlp", TIME_MLP))
