"""One file with a whole system in it, as Stable Diffusion's authors publish them: their names of tensors, and ours.

    model.diffusion_model.input_blocks.4.0.in_layers.2.weight                   the UNet
    control_model.input_hint_block.0.weight                                    a ControlNet
    first_stage_model.decoder.up.3.block.0.conv1.weight                         the VAE
    cond_stage_model.transformer.text_model.encoder.layers.0...                 OpenAI's CLIP, in SD 1
    cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight          OpenCLIP, in SD 2
    conditioner.embedders.0.transformer..., conditioner.embedders.1.model...   XL has both, its refiner the latter

Their UNet counts its layers in one row, `input_blocks.{n}`, where ours and the Hub's have levels: so the tables are
generated from a config, by counting. Sources: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py
and model.py; Stability-AI/generative-models; mlfoundations/open_clip, transformer.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .clip import CLIP_TEXT
from .rules import Table, bare, nested, same
from .unet import SPATIAL_TRANSFORMER


class Original(NamedTuple):
    """How a network stands in such a file: what its names may begin with, as most write it first; their table without
    that; and what they begin with where the network is alone in its file."""

    prefixes: tuple[str, ...]
    table: Table
    alone: str = ""


RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "skip"),
]


def mlp(there: str, here: str) -> list[tuple[str, str]]:
    return [(f"{there}.0", f"{here}.fc1"), (f"{there}.2", f"{here}.fc2")]


def layer(there: str, here: str, number: int) -> list[tuple]:
    """A residual block and, where the level has it, the attention behind it."""
    attention = nested(f"{there}.1", f"{here}.attentions.{number}", SPATIAL_TRANSFORMER)
    return [*nested(f"{there}.0", f"{here}.resnets.{number}", RESNET), *attention]


def way_down(config: Mapping[str, Any]) -> list[tuple]:
    """From the timestep and the sample to the middle, which is also what a ControlNet has of a UNet."""
    vectors = "added_mlp" if config["addition_embed_type"] else "class_embedding"  # of XL's sizes; of whatever else
    rows = [*mlp("time_embed", "time_mlp"), *mlp("label_emb.0", vectors), ("label_emb", "class_embedding")]
    rows += [("input_blocks.0.0", "conv_in")]
    n = 0
    for level, count in enumerate(layers(config)):
        for number in range(count):
            n += 1
            rows += layer(f"input_blocks.{n}", f"down.{level}", number)
        n += 1  # the last level has none, and the count ends there
        rows += [(f"input_blocks.{n}.0.op", f"down.{level}.downsample.conv")]
    return [*rows, *layer("middle_block", "mid", 0), *nested("middle_block.2", "mid.resnets.1", RESNET)]


def way_up(config: Mapping[str, Any]) -> list[tuple]:
    rows, n = [("out.0", "norm_out"), ("out.2", "conv_out")], 0
    for level, count in enumerate(reversed(layers(config))):
        for number in range(count + 1):
            rows += layer(f"output_blocks.{n}", f"up.{level}", number)
            n += 1
        last = 2 if "Attn" in config["up_block_types"][level] else 1  # in the level's last layer, after all else there
        rows += [(f"output_blocks.{n - 1}.{last}.conv", f"up.{level}.upsample.conv")]
    return rows


def layers(config: Mapping[str, Any]) -> Sequence[int]:
    """How many each level has, on the way down."""
    count = config["layers_per_block"]
    return [count] * len(config["block_out_channels"]) if isinstance(count, int) else count


def unet(config: Mapping[str, Any]) -> Table:
    return Table(way_down(config) + way_up(config))


def controlnet(config: Mapping[str, Any]) -> Table:
    rows = [("zero_convs.{}.0", "out_down.{}"), ("middle_block_out.0", "out_mid")]
    count = 2 * len(config["conditioning_embedding_out_channels"])  # of convolutions, each with an activation behind it
    places = ["conv_in", *(f"blocks.{number}" for number in range(count - 2)), "conv_out"]
    rows += [(f"input_hint_block.{2 * number}", f"control.{place}") for number, place in enumerate(places)]
    return Table(way_down(config) + rows)


VAE_RESNET = [*same("norm1", "conv1", "norm2", "conv2"), ("nin_shortcut", "skip")]

VAE_ATTENTION = [  # by 1 x 1 convolutions
    ("norm", "norm"),
    *((name, name, "convolution") for name in ("q", "k", "v")),
    ("proj_out", "out", "convolution"),
]


def vae(config: Mapping[str, Any]) -> Table:
    rows = same("quant_conv", "post_quant_conv")
    for side in ("encoder", "decoder"):
        rows += same(f"{side}.conv_in", f"{side}.conv_out", f"{side}.norm_out")
        rows += nested(f"{side}.mid.attn_1", f"{side}.mid.attentions.0", VAE_ATTENTION)
        for number in (0, 1):
            rows += nested(f"{side}.mid.block_{number + 1}", f"{side}.mid.resnets.{number}", VAE_RESNET)
    levels = len(config["block_out_channels"])
    for level in range(levels):
        up = levels - 1 - level  # the decoder's levels have the numbers of the encoder's there
        rows += nested(f"encoder.down.{level}.block.{{}}", f"encoder.down.{level}.resnets.{{}}", VAE_RESNET)
        rows += nested(f"decoder.up.{up}.block.{{}}", f"decoder.up.{level}.resnets.{{}}", VAE_RESNET)
        rows += [(f"encoder.down.{level}.downsample.conv", f"encoder.down.{level}.resample.conv")]
        rows += [(f"decoder.up.{up}.upsample.conv", f"decoder.up.{level}.resample.conv")]
    return Table(rows)


OPEN_AI = "quick_gelu"  # the activation of OpenAI's CLIP; OpenCLIP has the exact GELU

OPEN_CLIP_LAYER = [
    ("ln_1", "norm1"),
    *(
        bare(f"attn.in_proj_{end}", f"attention.{name}.{end}", f"third {number}")
        for number, name in enumerate("qkv")
        for end in ("weight", "bias")
    ),
    ("attn.out_proj", "attention.out"),
    ("ln_2", "norm2"),
    ("mlp.c_fc", "fc1"),
    ("mlp.c_proj", "fc2"),
]

OPEN_CLIP = [
    ("token_embedding", "token_embedding"),
    bare("positional_embedding", "position_embedding.weight"),
    *nested("transformer.resblocks.{}", "layers.{}", OPEN_CLIP_LAYER),
    ("ln_final", "final_layer_norm"),
    bare("text_projection", "text_projection.weight", "transpose"),
]


def text_encoder(config: Mapping[str, Any], projects: bool) -> Table:
    """Of OpenAI's CLIP, whose names are the Hub's, or of OpenCLIP.

    An encoder that doesn't project (SD 1, SD 2, XL's first) is read without what comes after its states: the projection
    and, of OpenCLIP, the last layer, which SD 2 was trained without, and which the Hub hasn't.
    """
    if config["hidden_act"] == OPEN_AI:
        ignored = ("text_projection.weight", "logit_scale", *CLIP_TEXT.ignored)
        return Table(CLIP_TEXT.rows, CLIP_TEXT.aliases, ignored)
    ignored = ["logit_scale", "attn_mask"]
    if not projects:
        last = Table(nested(f"transformer.resblocks.{config['num_hidden_layers']}", "", OPEN_CLIP_LAYER)).rows
        ignored += ["text_projection", *(row.hub + end for row in last for end in row.ends)]
    return Table(OPEN_CLIP, ignored=tuple(ignored))


ENCODERS = ("text_encoder", "text_encoder_2")


def original(name: str, config: Mapping[str, Any], parts: Sequence[str]) -> Original | None:
    """How the component `name` of a pipeline with these `parts` stands in a file; None for those that never do.

    `config` has the keys of its config, as the Hub has them.
    """
    if name == "unet":
        return Original(("model.diffusion_model.",), unet(config), alone="model.diffusion_model.")
    if name == "controlnet":
        return Original(("control_model.",), controlnet(config), alone="control_model.")
    if name == "vae":
        return Original(("first_stage_model.", "vae."), vae(config))
    if name in ENCODERS:
        encoders = [part for part in ENCODERS if part in parts]
        place = f"conditioner.embedders.{encoders.index(name)}" if "text_encoder_2" in encoders else "cond_stage_model"
        inside = "transformer" if config["hidden_act"] == OPEN_AI else "model"
        return Original((f"{place}.{inside}.",), text_encoder(config, projects=name == "text_encoder_2"))
    return None
