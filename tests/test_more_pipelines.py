"""Pix2pix, the x4 upscaler, variations and depth beside the reference's; what chooses and shares pipelines."""

import functools
import json

import diffusers
import numpy as np
import pytest
import torch
import transformers
from layouts import make_folder
from PIL import Image
from reference import difference, narrow_config, randomize

import minidiff

PICTURE = 1e-4  # in [0, 1]
LATENTS = 1e-4  # relative to the largest
LIBRARIES = (minidiff, diffusers)
PROMPT = "a photograph of an astronaut riding a horse"
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM |= {"clip_sample": False}
UNET, VAE = (narrow_config("stable-diffusion-v1-5", part)[1] for part in ("unet", "vae"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(height=64, width=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Tokenizer and text encoder, in both libraries' classes."""
    folder = make_folder("stable-diffusion-v1-5", tmp_path_factory.mktemp("text") / "folder")
    parts = {"tokenizer": "CLIPTokenizer", "text_encoder": "CLIPTextModel"}
    return [
        {name: getattr(library, cls).from_pretrained(folder / name) for name, cls in parts.items()}
        for library in (minidiff, transformers)
    ]


def make(place, name, text, unet, vae=VAE, **others):
    """The pipeline in both libraries, with the same random weights: saved by the reference, read by minidiff."""
    parts = {"scheduler": diffusers.DDIMScheduler(**DDIM), **text[1]} | others
    parts["unet"] = randomize(diffusers.UNet2DConditionModel.from_config(UNET | unet), 0)
    parts["vae"] = randomize(diffusers.AutoencoderKL.from_config(vae), 1)
    reference = getattr(diffusers, name)(**parts)
    saved = {key: value for key, value in parts.items() if hasattr(value, "save_pretrained")}
    getattr(diffusers, name)(**parts | {key: None for key in parts if key not in saved}).save_pretrained(place)
    reference.scheduler = type(reference.scheduler).from_pretrained(place / "scheduler")  # no key a default then
    given = {key: value for key, value in others.items() if key not in saved}
    ours = getattr(minidiff, name).from_pretrained(place, **given)
    for pipe in (ours, reference):
        pipe.set_progress_bar_config(disable=True)
    return ours, reference


def draw(pipe, **arguments):
    """The picture, and the latents after every step."""
    steps, step = [], pipe.scheduler.step

    @functools.wraps(step)  # pipelines look at its arguments
    def keep(*args, **kwargs):
        out = step(*args, **kwargs)
        steps.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipe.scheduler.step = keep
    seeds = arguments.pop("seeds", 0)
    generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    try:
        images = pipe(**{"num_inference_steps": 3, "output_type": "np", "generator": generator} | arguments).images
        return images, torch.stack(steps)
    finally:
        del pipe.scheduler.step


def compare(pipes, **arguments):
    (ours, latents), (expected, expected_latents) = (draw(pipe, **arguments) for pipe in pipes)
    for mine, theirs in zip(latents, expected_latents, strict=True):
        assert difference(mine, theirs) <= LATENTS
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - expected).max() <= PICTURE


def swap(pipes, name, **changes):
    for pipe, library in zip(pipes, LIBRARIES, strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, **changes)


# Pix2pix

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def pix2pix(text, tmp_path_factory):
    name = "StableDiffusionInstructPix2PixPipeline"
    return make(tmp_path_factory.mktemp("pix2pix"), name, text, {"in_channels": 8}, **NO_CHECKER)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": picture()},
        {"image": picture(75, 50), "image_guidance_scale": 1.0, "negative_prompt": "blurred"},
        {"image": picture(), "image_guidance_scale": 0.9},  # not guided
        {"image": picture(), "guidance_scale": 1.0},
        {"image": [picture(), picture(seed=1)], "prompt": [PROMPT, "a cat"], "seeds": [1, 2]},
        {"image": torch.rand(1, 3, 64, 64, generator=seeded()), "num_images_per_prompt": 2},
        {"image": torch.randn(1, 4, 8, 8, generator=seeded())},
        {"image": picture(), "latents": torch.randn(1, 4, 8, 8, generator=seeded(5))},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_pix2pix(pix2pix, arguments):
    swap(pix2pix, "DDIMScheduler")
    compare(pix2pix, **{"prompt": PROMPT} | arguments)


@pytest.mark.parametrize(
    ("name", "changes"), [("EulerDiscreteScheduler", {}), ("PNDMScheduler", {"skip_prk_steps": True})]
)
def test_pix2pix_schedulers(pix2pix, name, changes):
    swap(pix2pix, name, **changes)
    compare(pix2pix, prompt=PROMPT, image=picture())


def test_pix2pix_callback(pix2pix):
    swap(pix2pix, "DDIMScheduler")
    shapes = []

    def see(pipe, i, t, tensors):
        shapes.append({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return {"image_latents": torch.zeros_like(tensors["image_latents"])}

    results = []
    for pipe in pix2pix:
        names = list(pipe._callback_tensor_inputs)
        arguments = {"callback_on_step_end": see, "callback_on_step_end_tensor_inputs": names, "generator": seeded()}
        results.append(pipe(PROMPT, picture(), num_inference_steps=2, output_type="latent", **arguments).images)
        assert pipe.image_guidance_scale == 1.5
    assert shapes[:2] == shapes[2:]
    assert shapes[0]["prompt_embeds"][0] == 3
    assert difference(*results) <= LATENTS


# The upscaler

UPSCALER = {
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
}
SMALL_VAE = VAE | {
    "block_out_channels": VAE["block_out_channels"][:3],
    "down_block_types": VAE["down_block_types"][:3],
    "up_block_types": VAE["up_block_types"][:3],
}


@pytest.fixture(scope="module")
def upscale(text, tmp_path_factory):
    name, place = "StableDiffusionUpscalePipeline", tmp_path_factory.mktemp("upscale")
    low = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    return make(place, name, text, UPSCALER, SMALL_VAE, low_res_scheduler=low, max_noise_level=300)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": picture(16, 16)},
        {"image": picture(19, 14), "noise_level": 100, "negative_prompt": "blurred"},
        {"image": picture(16, 16), "guidance_scale": 1.0, "num_images_per_prompt": 2},
        {"image": [picture(16, 16), picture(16, 16, 1)], "prompt": [PROMPT, "a cat"], "seeds": [1, 2]},
        {
            "image": [picture(16, 16), picture(16, 16, 1)],
            "prompt": [PROMPT, "a cat"],
            "negative_prompt": ["a", "b"],
            "num_images_per_prompt": 2,
        },
        {"image": torch.rand(1, 3, 16, 16, generator=seeded()), "noise_level": 0},
        {"image": np.random.default_rng(0).random((1, 16, 24, 3), dtype=np.float32), "eta": 0.5},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_upscale(upscale, arguments):
    swap(upscale, "DDIMScheduler")
    compare(upscale, **{"prompt": PROMPT} | arguments)


def test_upscale_settings(upscale, tmp_path):
    ours, reference = upscale
    swap(upscale, "EulerDiscreteScheduler")
    compare(upscale, prompt=PROMPT, image=picture(16, 16))
    swap(upscale, "DDIMScheduler")
    assert ours.max_noise_level == reference.config.max_noise_level == 300
    assert ours.vae.config.scaling_factor == reference.vae.config.scaling_factor == 0.08333
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert again.config.max_noise_level == 300
    compare((ours, again), prompt=PROMPT, image=picture(16, 16), num_inference_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": 301}, "noise_level=301 must lie in 0..300"),
        ({"noise_level": -1}, "noise_level=-1"),
        ({"image": picture().convert("L")}, "must have 3 channels"),
        ({"prompt": [PROMPT, "a cat"]}, "image holds 1 for 2 prompts"),
        ({"image": None}, "image must be"),
    ],
)
def test_upscale_bad_arguments(upscale, arguments, message):
    with pytest.raises(ValueError, match=message):
        upscale[0](**{"prompt": PROMPT, "image": picture(16, 16), "num_inference_steps": 2} | arguments)


# Depth


class Estimator(torch.nn.Module):
    """Nearer where it is brighter. Takes what `features` makes."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values):
        return transformers.modeling_outputs.DepthEstimatorOutput(predicted_depth=pixel_values.mean(1))


def features(images, return_tensors):
    arrays = [np.asarray(image.resize((48, 48)), np.float32) for image in images]
    return transformers.BatchFeature({"pixel_values": torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2)})


@pytest.fixture(scope="module")
def depth(text, tmp_path_factory):
    name, place = "StableDiffusionDepth2ImgPipeline", tmp_path_factory.mktemp("depth")
    given = {"depth_estimator": Estimator(), "feature_extractor": features}
    return make(place, name, text, {"in_channels": 5}, **given)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": picture()},
        {"image": picture(75, 50), "strength": 0.4},
        {"image": picture(), "depth_map": torch.rand(1, 30, 20, generator=seeded()), "strength": 1.0},
        {"image": [picture(), picture(seed=1)], "prompt": [PROMPT, "a cat"], "seeds": [1, 2]},
        {"image": torch.rand(1, 3, 64, 48, generator=seeded()), "depth_map": torch.rand(1, 64, 48, generator=seeded())},
        {"image": picture(), "num_images_per_prompt": 2, "guidance_scale": 1.0},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_depth(depth, arguments):
    swap(depth, "DDIMScheduler")
    compare(depth, **{"prompt": PROMPT, "num_inference_steps": 4} | arguments)


def test_depth_without_an_estimator(depth):
    alone = minidiff.StableDiffusionDepth2ImgPipeline(
        **depth[0].components | {"depth_estimator": None, "feature_extractor": None}
    )
    with pytest.raises(ValueError, match="depth_map must be given"):
        alone(PROMPT, picture())
    for depth_map, message in [
        (torch.ones(1, 8, 8), "depth_map is the same everywhere"),
        (torch.rand(8, 8), "depth_map has shape"),
        (torch.rand(3, 8, 8), "depth_map holds 3 for 1 pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            alone(PROMPT, picture(), depth_map)


# Variations


@pytest.fixture(scope="module")
def variation(text, tmp_path_factory):
    config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"patch_size": 56, "projection_dim": UNET["cross_attention_dim"]}
    encoder = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
    extractor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil()
    parts = {"image_encoder": randomize(encoder, 2), "feature_extractor": extractor, "safety_checker": None}
    name = "StableDiffusionImageVariationPipeline"
    parts |= {"requires_safety_checker": False}
    return make(tmp_path_factory.mktemp("variation"), name, [{}, {}], {}, **parts)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": picture(100, 70)},
        {"image": [picture(), picture(seed=1)], "num_images_per_prompt": 2, "height": 72, "width": 40},
        {"image": torch.randn(1, 3, 224, 224, generator=seeded()), "guidance_scale": 1.0},
        {"image": picture(), "latents": torch.randn(1, 4, 8, 8, generator=seeded(5))},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_variation(variation, arguments):
    compare(variation, **{"height": 64, "width": 64} | arguments)


# What chooses and shares

TASKS = {"Text2Image": "", "Image2Image": "Img2Img", "Inpainting": "Inpaint"}


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return make_folder("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd") / "folder")


@pytest.mark.parametrize("task", TASKS)
def test_auto_pipelines(sd, task):
    auto = getattr(minidiff, f"AutoPipelineFor{task}")
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = auto.from_pretrained(sd, **options, torch_dtype=torch.bfloat16)
    assert type(pipe).__name__ == f"StableDiffusion{TASKS[task]}Pipeline"
    assert pipe.dtype is torch.bfloat16
    for other in TASKS:
        made = getattr(minidiff, f"AutoPipelineFor{other}").from_pipe(pipe)
        assert type(made).__name__ == f"StableDiffusion{TASKS[other]}Pipeline"
        assert all(made.components[name] is part for name, part in pipe.components.items() if name != "scheduler")
        assert made.requires_safety_checker is False
        assert made.dtype is torch.bfloat16


def test_from_pipe(sd, pix2pix):
    pipe = minidiff.DiffusionPipeline.from_pretrained(sd, safety_checker=None, feature_extractor=None)
    scheduler = minidiff.DDIMScheduler(**DDIM)
    made = minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe, scheduler=scheduler)
    assert made.scheduler is scheduler
    assert made.unet is pipe.unet
    with pytest.raises(TypeError, match="has no ControlNet"):
        minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe, ControlNet=None)
    with pytest.raises(ValueError, match="has no image_encoder, which StableDiffusionImageVariationPipeline needs"):
        minidiff.StableDiffusionImageVariationPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"8 input channels.*StableDiffusionInstructPix2PixPipeline"):
        minidiff.StableDiffusionPipeline.from_pipe(pix2pix[0])
    with pytest.raises(minidiff.LoadError, match="Pix2PixPipeline has no AutoPipelineForText2Image"):
        minidiff.AutoPipelineForText2Image.from_pipe(pix2pix[0])


# Folders from 2022


@pytest.mark.parametrize("version", ["0.6.0", "0.8.1", "0.9.0.dev0", "0.9.0", "0.18.2", None])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionInpaintPipeline"])
def test_sample_size_of_2022(sd, version, name, tmp_path):
    config = json.loads((sd / "unet/config.json").read_text()) | {"sample_size": 32}
    config = {key: value for key, value in config.items() if key != "_diffusers_version"}
    config |= {} if version is None else {"_diffusers_version": version}
    for file in sd.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "unet").unlink()
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    weights = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(sd / weights)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    ours, reference = (getattr(library, name).from_pretrained(tmp_path, **options) for library in LIBRARIES)
    assert ours.unet.config.sample_size == reference.unet.config.sample_size
    assert ours.unet.config.sample_size == (64 if version in ("0.6.0", "0.8.1") else 32)
    ours.unet.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["sample_size"] == ours.unet.config.sample_size
