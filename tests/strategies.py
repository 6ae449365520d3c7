"""Legal configs of every model, small, and inputs for it: what the property tests draw from."""

import torch
from hypothesis import strategies as st

import minidiff as m

UNET_BLOCKS = {
    "UNet2DConditionModel": (("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")),
    "UNet2DModel": (("AttnDownBlock2D", "DownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")),
}


@st.composite
def levels(draw):
    """Widths from fine to coarse, none with groups of one channel: a norm would take the bias before it away."""
    return tuple(draw(st.lists(st.sampled_from((8, 16)), min_size=1, max_size=3)))


@st.composite
def unet_configs(draw, name):
    widths = draw(levels())
    down, up = UNET_BLOCKS[name]
    config = {
        "in_channels": draw(st.sampled_from((1, 3, 4, 9))),
        "out_channels": draw(st.sampled_from((1, 3, 4))),
        "block_out_channels": widths,
        "norm_num_groups": 4,
        "layers_per_block": draw(st.integers(1, 2)),
        "down_block_types": tuple(draw(st.sampled_from(down)) for _ in widths),
        "up_block_types": tuple(draw(st.sampled_from(up)) for _ in widths),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.integers(0, 1)),
        "resnet_time_scale_shift": draw(st.sampled_from(("default", "scale_shift"))),
    }
    classes = [{}, {"num_class_embeds": 5}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
    config |= draw(st.sampled_from(classes))
    if name == "UNet2DModel":
        config["mid_block_type"] = draw(st.sampled_from(("UNetMidBlock2D", None)))
        config["attention_head_dim"] = draw(st.sampled_from((None, 4, 8)))
        config["add_attention"] = draw(st.booleans())
        config["downsample_padding"] = draw(st.integers(0, 1))
        return config
    config["cross_attention_dim"] = draw(st.sampled_from((6, 8)))
    config["attention_head_dim"] = tuple(draw(st.sampled_from((1, 2, 4))) for _ in widths)
    config["transformer_layers_per_block"] = tuple(draw(st.integers(1, 2)) for _ in widths)
    config["use_linear_projection"] = draw(st.booleans())
    config["mid_block_type"] = draw(st.sampled_from(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)))
    config["time_cond_proj_dim"] = draw(st.sampled_from((None, 6)))  # as in latent consistency models
    if draw(st.booleans()):  # as in XL: 6 numbers of 4 waves each, and 5 of pooled text
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 4
        config["projection_class_embeddings_input_dim"] = 6 * 4 + 5
    elif draw(st.booleans()):  # as in AudioLDM: a vector beside the timestep
        config |= {"class_embed_type": draw(st.sampled_from(("projection", "simple_projection")))}
        config |= {"class_embeddings_concat": draw(st.booleans()), "projection_class_embeddings_input_dim": 7}
    return config


@st.composite
def vae_configs(draw):
    widths = draw(levels())
    return {
        "in_channels": draw(st.sampled_from((1, 3))),
        "out_channels": draw(st.sampled_from((1, 3))),
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": draw(st.integers(1, 2)),
        "latent_channels": draw(st.integers(1, 4)),
        "norm_num_groups": 4,
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
        "mid_block_add_attention": draw(st.booleans()),
    }


@st.composite
def clip_configs(draw):
    return {
        "vocab_size": 40,
        "hidden_size": draw(st.sampled_from((8, 12))),
        "intermediate_size": draw(st.integers(1, 20)),
        "projection_dim": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": draw(st.sampled_from((1, 2, 4))),
        "max_position_embeddings": draw(st.integers(4, 12)),
        "hidden_act": draw(st.sampled_from(("quick_gelu", "gelu"))),
        "eos_token_id": 39,
    }


CONFIGS = {
    "AutoencoderKL": vae_configs(),
    "CLIPTextModel": clip_configs(),
    "CLIPTextModelWithProjection": clip_configs(),
    "UNet2DConditionModel": unet_configs("UNet2DConditionModel"),
    "UNet2DModel": unet_configs("UNet2DModel"),
}


def inputs(data, model, batch, device="cpu"):
    """Legal arguments of `forward`, with a drawn size. Tensors have the batch first."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if isinstance(model, m.CLIPTextModel):
        length = data.draw(st.integers(1, config.max_position_embeddings))
        ids = torch.randint(0, 40, (batch, length), generator=generator)
        ids[:, -1] = config.eos_token_id
        return {"input_ids": ids.to(device)}
    levels = len(config.block_out_channels)
    least, step = (1, 1) if isinstance(model, m.UNet2DConditionModel) else (2 ** (levels - 1), 2 ** (levels - 1))
    H, W = (least + step * data.draw(st.integers(1, 5)) for _ in "HW")

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(device)

    arguments = {"sample": normal(config.in_channels, H, W)}
    if not isinstance(model, m.AutoencoderKL):
        arguments["timestep"] = torch.randint(0, 1000, (batch,), generator=generator).to(device)
        kind, count = config.class_embed_type, config.num_class_embeds
        if kind in ("identity", "projection", "simple_projection"):
            arguments["class_labels"] = normal(config.time_dim if kind == "identity" else 7)
        elif kind or count:
            arguments["class_labels"] = torch.randint(0, count or 1000, (batch,), generator=generator).to(device)
    if isinstance(model, m.UNet2DConditionModel):
        if config.time_cond_proj_dim:
            arguments["timestep_cond"] = normal(config.time_cond_proj_dim)
        arguments["encoder_hidden_states"] = normal(data.draw(st.integers(2, 5)), config.cross_attention_dim)
        if config.addition_embed_type:
            arguments["added_cond_kwargs"] = {"text_embeds": normal(5), "time_ids": 100 * normal(6)}
    return arguments
