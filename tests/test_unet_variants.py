"""What real folders vary in the networks, beside the reference, with random weights."""

import pytest
import torch
from reference import difference, narrow_config, twins
from test_models import BOUND, noise, unet_inputs

from minidiff import ConfigError

LEVELS = {"block_out_channels": [16, 32, 32], "norm_num_groups": 8, "attention_head_dim": 8}
PIXELS = LEVELS | {
    "sample_size": 16,
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}


@torch.no_grad()
@pytest.mark.parametrize(
    "more",
    [
        {"mid_block_type": None},  # BK-SDM
        {"mid_block_type": "UNetMidBlock2D"},  # Segmind-Vega: one residual block
        {"cross_attention_dim": [24, 24, 24, 24]},
        {"transformer_layers_per_block": [1, 2, 1, 3]},
        {
            "transformer_layers_per_block": [1, [2, 1], [1, 3], [2, 4]],
            "reverse_transformer_layers_per_block": [1, [1, 2, 3], [2, 1, 1], 1],
        },
        {"layers_per_block": [1, 2, 3, 1]},
        {"time_embedding_dim": 48, "dropout": 0.3},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
)
def test_condition_unet(more):
    class_name, config = narrow_config("stable-diffusion-v1-5", "unet")
    reference, ours = twins(class_name, config | more)
    inputs = unet_inputs(config | {"cross_attention_dim": ours.config.per_level("cross_attention_dim")[0]})
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("kind", [{"num_class_embeds": 5}, {"class_embed_type": "simple_projection"}], ids=str)
def test_class_beside_the_timestep(kind):
    """AudioLDM's: no text, and in its place a vector."""
    class_name, config = narrow_config("stable-diffusion-v1-5", "unet")
    more = kind | {"class_embeddings_concat": True, "cross_attention_dim": config["block_out_channels"]}
    reference, ours = twins(class_name, config | more | {"projection_class_embeddings_input_dim": 20})
    labels = torch.tensor([4, 0]) if "num_class_embeds" in kind else noise(2, 20)
    inputs = unet_inputs(config) | {"encoder_hidden_states": None, "class_labels": labels}
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND


@torch.no_grad()
def test_guidance_scale_embedded():
    class_name, config = narrow_config("stable-diffusion-v1-5", "unet")
    reference, ours = twins(class_name, config | {"time_cond_proj_dim": 20})
    inputs = unet_inputs(config)
    plain = ours(**inputs).sample
    assert difference(plain, reference(**inputs).sample) <= BOUND
    inputs["timestep_cond"] = noise(2, 20, seed=5)
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND
    assert difference(ours(**inputs).sample, plain) > 1e-3
    with pytest.raises(ValueError, match="timestep_cond"):
        ours(**inputs | {"timestep_cond": noise(2, 7)})


@torch.no_grad()
def test_no_text_but_pixels_twice():
    class_name, config = narrow_config("stable-diffusion-v1-5", "unet")
    reference, ours = twins(class_name, config | {"cross_attention_dim": config["block_out_channels"]})
    inputs = unet_inputs(config) | {"encoder_hidden_states": None}
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"downsample_type": "resnet", "upsample_type": "resnet"}, None),
        ({"resnet_time_scale_shift": "scale_shift"}, None),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}, None),
        ({"attn_norm_num_groups": 16, "time_embedding_dim": 40, "dropout": 0.1}, None),
        ({"mid_block_type": None}, None),
        ({"num_class_embeds": 5}, torch.tensor([4, 0])),
        ({"class_embed_type": "timestep"}, torch.tensor([4, 900])),
        ({"class_embed_type": "identity"}, noise(2, 64)),
    ],
)
def test_unconditional_unet(more, labels):
    reference, ours = twins("UNet2DModel", PIXELS | more)
    inputs = {"sample": noise(2, 3, 16, 24), "timestep": torch.tensor([3, 700])}
    inputs |= {} if labels is None else {"class_labels": labels}
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND
    with pytest.raises(ValueError, match="class_labels"):
        ours(inputs["sample"], 5, torch.tensor([1, 2]) if labels is None else None)


def test_dropout_is_for_training_alone():
    ours = twins("UNet2DModel", PIXELS | {"dropout": 0.5})[1]
    x = noise(1, 3, 16, 16)
    assert torch.equal(ours(x, 5).sample, ours(x, 5).sample)
    assert not torch.equal(ours.train()(x, 5).sample, ours(x, 5).sample)


@pytest.mark.parametrize(
    "more",
    [
        {"transformer_layers_per_block": [1, [2, 1], 1, 1]},
        {"transformer_layers_per_block": [1, [2], 1, 1], "reverse_transformer_layers_per_block": [1, 1, 1, 1]},
        {"cross_attention_dim": [24, 24]},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"class_embeddings_concat": True},
    ],
)
def test_errors_name_the_key(more):
    class_name, config = narrow_config("stable-diffusion-v1-5", "unet")
    import minidiff

    with pytest.raises(ConfigError, match=f"{next(iter(more))}|reverse_"):
        getattr(minidiff, class_name).from_config(config | more)


NCSNPP = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
}


NARROWER = {
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"],
}


@torch.no_grad()
@pytest.mark.parametrize(
    "more",
    [
        {},
        NARROWER,
        {"layers_per_block": 2, "resnet_time_scale_shift": "scale_shift"},
        {"attention_head_dim": 16, "dropout": 0.1},
    ],
)
def test_ncsnpp(more):
    reference, ours = twins("UNet2DModel", NCSNPP | more)
    inputs = {"sample": 3 * noise(2, 3, 16, 24), "timestep": torch.tensor([1348.0, 0.02])}
    assert difference(ours(**inputs).sample, reference(**inputs).sample) <= BOUND


@pytest.mark.parametrize(
    "more",
    [
        {"down_block_types": ["SkipDownBlock2D", "DownBlock2D", "SkipDownBlock2D"]},
        {"block_out_channels": [32, 48, 64]},
        {"in_channels": 4},
        {"mid_block_scale_factor": 0},
    ],
)
def test_ncsnpp_errors_name_the_key(more):
    from minidiff import UNet2DModel

    with pytest.raises(ConfigError, match=next(iter(more))):
        UNet2DModel.from_config(NCSNPP | more)
    with pytest.raises(ConfigError, match="norm_num_groups"):
        UNet2DModel.from_config(PIXELS | {"norm_num_groups": None})
