"""Stable Diffusion XL on pictures beside the reference: the refiner, and inpainting with 9 and 4 channels."""

import diffusers
import numpy as np
import pytest
import torch
from layouts import make_folder
from PIL import Image
from reference import twins
from test_pipelines import PICTURE, PROMPT, seeded
from test_xl import both, compare, draw, with_scheduler

import minidiff


def picture(width=48, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask(width=48, height=64):
    hole = np.zeros((height, width), np.uint8)
    hole[16:40, 8:32] = 255
    return Image.fromarray(hole)


def parts(pipe):
    models = {name: part for name, part in pipe.components.items() if not isinstance(part, bool | None)}
    return models | {"image_encoder": None, "feature_extractor": None}


def made_as(pipes, name, config=None, **options):
    """Pipelines of another class with the parts of `pipes`, and a UNet of its own with `config`."""
    unets = twins("UNet2DConditionModel", unet_config(pipes) | config, seed=5)[::-1] if config else None
    made = []
    for i, (pipe, library) in enumerate(zip(pipes, (minidiff, diffusers), strict=True)):
        own = parts(pipe) | ({"unet": unets[i]} if unets else {})
        made.append(getattr(library, name)(**own | options))
        made[-1].set_progress_bar_config(disable=True)
    return made


def unet_config(pipes):
    return {key: value for key, value in pipes[1].unet.config.items() if not key.startswith("_")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return both(make_folder("stable-diffusion-xl-base-1.0", tmp_path_factory.mktemp("xl") / "folder"))


@pytest.fixture(scope="module")
def image(base):
    return made_as(base, "StableDiffusionXLImg2ImgPipeline")


@pytest.fixture(scope="module")
def refiner(base):
    """No first text encoder, and five numbers in place of six."""
    c = base[1].unet.config
    wide = base[1].text_encoder_2.config
    config = {
        "cross_attention_dim": wide.hidden_size,
        "projection_class_embeddings_input_dim": wide.projection_dim + 5 * c.addition_time_embed_dim,
    }
    options = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return made_as(base, "StableDiffusionXLImg2ImgPipeline", config, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strength": 0.3, "num_inference_steps": 10},
        {"strength": 0.75, "num_inference_steps": 4, "negative_prompt": "blurred"},
        {"strength": 1.0},
        {"denoising_start": 0.5, "num_inference_steps": 6, "image": torch.randn(1, 4, 8, 6, generator=seeded(4))},
        {"denoising_start": 0.4, "denoising_end": 0.8, "num_inference_steps": 8, "guidance_rescale": 0.5},
        {"strength": 0.6, "image": [picture(), picture(seed=1)], "prompt": ["a", "b"], "num_images_per_prompt": 2},
        {"strength": 0.6, "num_images_per_prompt": 2, "generator": lambda: [seeded(1), seeded(2)]},
        {
            "strength": 0.6,
            "original_size": (32, 80),
            "crops_coords_top_left": (3, 4),
            "negative_crops_coords_top_left": (5, 6),
            "negative_target_size": (7, 8),
        },
        {"strength": 0.5, "latents": torch.randn(1, 4, 8, 6, generator=seeded(4))},
        {"strength": 0.9, "image": picture(61, 75)},
    ],
)
def test_image_to_image(image, arguments):
    compare(image, **{"prompt": PROMPT, "image": picture(), "num_inference_steps": 5, **arguments})


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_image_to_image_with_other_schedulers(image, name):
    before = [pipe.scheduler for pipe in image]
    try:
        with_scheduler(image, name)
        for part in ({"strength": 0.5}, {"denoising_start": 0.5}):
            compare(image, prompt=PROMPT, image=picture(), num_inference_steps=6, **part)
    finally:
        for pipe, scheduler in zip(image, before, strict=True):
            pipe.scheduler = scheduler


def test_refiner(refiner):
    scores = {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0, "negative_crops_coords_top_left": (5, 6)}
    for more in ({}, scores | {"negative_prompt": "blurred", "prompt_2": "read by nobody"}):
        compare(refiner, prompt=PROMPT, image=picture(), strength=0.5, num_inference_steps=4, **more)


def test_base_and_refiner_share_one_run(base, refiner):
    """The base's latents at 0.8 are what the refiner begins with."""
    finished = []
    for one, other in zip(base, refiner, strict=True):
        run = {"num_inference_steps": 5, "generator": seeded()}
        latents = one(PROMPT, denoising_end=0.8, output_type="latent", height=64, width=48, **run).images
        image = other(PROMPT, image=latents, denoising_start=0.8, output_type="np", **run).images
        finished.append(image)
    assert np.abs(finished[0] - finished[1]).max() <= PICTURE


def test_refiner_saves(refiner, tmp_path):
    arguments = {"prompt": PROMPT, "image": picture(), "strength": 0.5, "num_inference_steps": 4}
    expected = draw(refiner[0], **arguments)[0]
    for i, pipe in enumerate(refiner):
        pipe.save_pretrained(tmp_path / str(i))
        for again in both(tmp_path / str(i)):
            assert np.abs(draw(again, **arguments)[0] - expected).max() <= PICTURE


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 1.0, "negative_prompt": "blurred"},
        {"strength": 0.5, "num_images_per_prompt": 2, "guidance_scale": 1.0},
        {"denoising_start": 0.4, "num_inference_steps": 5},
        {"generator": lambda: [seeded(1), seeded(2)], "num_images_per_prompt": 2},
    ],
)
def test_inpainting(base, channels, arguments):
    config = {"in_channels": 9} if channels == 9 else None
    pipes = made_as(base, "StableDiffusionXLInpaintPipeline", config)
    own = {"image": picture(), "mask_image": mask(), "height": 64, "width": 48}
    compare(pipes, **{"prompt": PROMPT, **own, **arguments})


def test_inpainting_a_crop(base):
    pipes = made_as(base, "StableDiffusionXLInpaintPipeline")
    drawn = [
        pipe(
            PROMPT,
            image=picture(),
            mask_image=mask(),
            height=64,
            width=64,
            padding_mask_crop=4,
            num_inference_steps=3,
            generator=seeded(),
        ).images[0]
        for pipe in pipes
    ]
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(drawn[1], int)).max() <= 1


def test_inpainting_with_means_and_deviations_encodes_without_them(base):
    config = {"latents_mean": [-1.6, 1.8, -1.3, 2.5], "latents_std": [8.4, 5.9, 6.5, 5.2]}
    vaes = []
    for pipe, library in zip(base, (minidiff, diffusers), strict=True):
        vae = library.AutoencoderKL.from_config(pipe.vae.config, **config)
        vae.load_state_dict(pipe.vae.state_dict())
        vaes.append(vae.eval())
    for name, more in (
        ("StableDiffusionXLInpaintPipeline", {"mask_image": mask(), "height": 64, "width": 48}),
        ("StableDiffusionXLImg2ImgPipeline", {"strength": 0.6}),
    ):
        pipes = []
        for pipe, library, vae in zip(base, (minidiff, diffusers), vaes, strict=True):
            pipes.append(getattr(library, name)(**parts(pipe) | {"vae": vae}))
            pipes[-1].set_progress_bar_config(disable=True)
        compare(pipes, prompt=PROMPT, image=picture(), **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoising_start": 0.8, "denoising_end": 0.5}, "denoising_start=0.8 must be less"),
        ({"denoising_start": 2.0}, "denoising_start"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"aesthetic_score": "good"}, "aesthetic_score"),
        ({"image": picture().convert("RGBA")}, "image"),
    ],
)
def test_bad_arguments(image, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        image[0](PROMPT, **{"image": picture(), "num_inference_steps": 5, **arguments})


def test_wrong_networks(base, refiner):
    with pytest.raises(ValueError, match="requires_aesthetics_score"):
        draw(
            made_as(base, "StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True)[0],
            prompt="a",
            image=picture(),
            strength=1.0,
        )
    with pytest.raises(ValueError, match="isn't XL's"):
        minidiff.StableDiffusionXLPipeline(
            **parts(base[0])
            | {
                "unet": twins(
                    "UNet2DConditionModel",
                    {
                        "block_out_channels": [16, 16],
                        "norm_num_groups": 8,
                        "cross_attention_dim": 8,
                        "down_block_types": ["DownBlock2D"] * 2,
                        "up_block_types": ["UpBlock2D"] * 2,
                    },
                )[1]
            }
        )
