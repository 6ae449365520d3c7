"""Every sampler in the pipelines that begin with a picture, and in XL's, beside the reference; and turbo models."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_tokenizer
from PIL import Image
from reference import difference, randomize, twins

import minidiff

PICTURE, LATENTS = 1e-4, 1e-4  # in [0, 1]; at every step, of the largest value
LIBRARIES = (minidiff, diffusers)
SAMPLERS = {
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "sde-dpmsolver++": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "LMSDiscreteScheduler": {},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 6,
    "eos_token_id": 99,
}
VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
    "cross_attention_dim": 16,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RNG = np.random.default_rng(0)
IMAGE = Image.fromarray(RNG.integers(0, 256, (24, 16, 3), np.uint8))
MASK = Image.fromarray(np.repeat(np.uint8([0, 255]), 12)[:, None].repeat(16, 1))


def text_encoders(name, seed):
    reference = randomize(getattr(transformers, name)(transformers.CLIPTextConfig(**TEXT)), seed)
    ours = getattr(minidiff, name)(**TEXT)
    ours.load_state_dict(reference.state_dict())
    return ours.eval(), reference


@pytest.fixture(scope="module")
def sd():
    """Both libraries' parts of a Stable Diffusion of 16 x 16 pixels; the prompt is given as states."""
    vae, unet = (twins(name, config)[::-1] for name, config in (("AutoencoderKL", VAE), ("UNet2DConditionModel", UNET)))
    text = text_encoders("CLIPTextModel", 3)
    none = dict.fromkeys(("safety_checker", "feature_extractor")) | {"tokenizer": tiny_tokenizer()}
    return [{"vae": vae[i], "unet": unet[i], "text_encoder": text[i], **none} for i in (0, 1)]


@pytest.fixture(scope="module")
def xl():
    vae, unet = twins("AutoencoderKL", VAE)[::-1], twins("UNet2DConditionModel", UNET | XL)[::-1]
    text, text_2 = text_encoders("CLIPTextModel", 3), text_encoders("CLIPTextModelWithProjection", 4)
    none = dict.fromkeys(("tokenizer", "tokenizer_2"))
    models = [{"vae": vae[i], "unet": unet[i], "text_encoder": text[i], "text_encoder_2": text_2[i]} for i in (0, 1)]
    return [parts | none for parts in models]


def embeds(width, pooled=False):
    generator = torch.Generator().manual_seed(5)
    names = ("prompt_embeds", "negative_prompt_embeds")
    given = {name: torch.randn(1, 16, width, generator=generator) for name in names}
    more = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds") if pooled else ()
    return given | {name: torch.randn(1, 6, generator=generator) for name in more}


def compare(parts, pipeline, sampler, keys=None, **arguments):
    """Draws with both libraries' `pipeline` of these parts, and says how many steps it took."""
    name = "DPMSolverMultistepScheduler" if sampler.startswith("sde") else sampler
    results = []
    for own, library in zip(parts, LIBRARIES, strict=True):
        scheduler = getattr(library, name)(**BETAS | SAMPLERS.get(sampler, {}) | (keys or {}))
        options = {} if "text_encoder_2" in own else {"requires_safety_checker": False}
        pipe = getattr(library, pipeline)(**own, scheduler=scheduler, **options)
        pipe.set_progress_bar_config(disable=True)
        steps = []

        def keep(_pipe, _i, _t, tensors, steps=steps):
            steps.append(tensors["latents"])
            return tensors

        states = embeds(16, pooled=True) if "text_encoder_2" in own else embeds(8)
        given = {"generator": torch.Generator().manual_seed(1), "output_type": "np", **states, **arguments}
        results.append((pipe(callback_on_step_end=keep, **given).images, steps))
    (picture, latents), (expected, expected_latents) = results
    assert np.isfinite(picture).all() and np.abs(picture - expected).max() <= PICTURE
    for mine, theirs in zip(latents, expected_latents, strict=True):
        assert difference(mine, theirs) <= LATENTS
    return len(latents)


@pytest.mark.parametrize("name", SAMPLERS)
def test_begun_with_a_picture(sd, name):
    for strength in (0.5, 1.0):
        begun = {"image": IMAGE, "strength": strength, "num_inference_steps": 6}
        compare(sd, "StableDiffusionImg2ImgPipeline", name, **begun)
        compare(sd, "StableDiffusionInpaintPipeline", name, mask_image=MASK, height=24, width=16, **begun)


@pytest.mark.parametrize("name", SAMPLERS)
def test_xl(xl, name):
    compare(xl, "StableDiffusionXLPipeline", name, num_inference_steps=4)
    begun = {"image": IMAGE, "strength": 0.6, "num_inference_steps": 5}
    compare(xl, "StableDiffusionXLImg2ImgPipeline", name, **begun)
    compare(xl, "StableDiffusionXLInpaintPipeline", name, mask_image=MASK, height=24, width=16, **begun)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo(sd, xl, steps):
    """Distilled models: no guidance, a step or few, Euler's ancestral ones from the last timestep on."""
    turbo = {"keys": {"timestep_spacing": "trailing"}, "guidance_scale": 0.0, "num_inference_steps": steps}
    for parts, name in ((sd, "StableDiffusion"), (xl, "StableDiffusionXL")):
        assert compare(parts, f"{name}Pipeline", "EulerAncestralDiscreteScheduler", **turbo) == steps
        begun = {"image": IMAGE, "strength": 0.5, **turbo, "num_inference_steps": 2 * steps}
        assert compare(parts, f"{name}Img2ImgPipeline", "EulerAncestralDiscreteScheduler", **begun) == steps


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_custom_timesteps_begun_midway(sd, name, strength):
    """Of Heun's the reference counts calls, 9 for 5 timesteps, and begins after the end where strength isn't large."""
    begun = {"image": IMAGE, "strength": strength, "timesteps": [900, 700, 500, 300, 100]}
    if name.startswith("Heun") and strength <= 0.5:
        with pytest.raises(ValueError, match=f"strength={strength} leaves none of 9 steps"):
            compare(sd, "StableDiffusionImg2ImgPipeline", name, **begun)
    else:
        compare(sd, "StableDiffusionImg2ImgPipeline", name, **begun)


def test_samplers_without_custom_timesteps(sd):
    with pytest.raises(ValueError, match="timesteps was given, which KDPM2DiscreteScheduler doesn't take"):
        begun = {"image": IMAGE, "timesteps": [900, 500, 100]}
        compare(sd, "StableDiffusionImg2ImgPipeline", "KDPM2DiscreteScheduler", **begun)
