"""Stable Diffusion XL beside the reference's pipelines: narrow, random weights, latents at every step."""

import copy
import sys
import types

import diffusers
import numpy as np
import pytest
import torch
from layouts import make_folder
from test_pipelines import PICTURE, PROMPT, agree, seeded

import minidiff

SIZE = {"height": 64, "width": 48}


def both(folder, **options):
    pipes = [
        library.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **options)
        for library in (minidiff, diffusers)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def draw(pipe, seed=0, **arguments):
    steps = []

    def keep(_pipe, _i, _t, tensors):
        steps.append(tensors["latents"])
        return tensors

    arguments = {"num_inference_steps": 3, "generator": seeded(seed)} | arguments
    return pipe(callback_on_step_end=keep, output_type="np", **arguments).images, torch.stack(steps)


def compare(pipes, **arguments):
    """`generator` may be a function: each pipeline gets its own."""
    results = []
    for pipe in pipes:
        own = {name: value() if callable(value) else value for name, value in arguments.items()}
        results.append(draw(pipe, **own))
    agree(*results)
    return results[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return both(make_folder("stable-diffusion-xl-base-1.0", tmp_path_factory.mktemp("xl") / "folder"))


def with_scheduler(pipes, name, **options):
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 5},
        {"prompt_2": "a cat", "negative_prompt": "blurred", "negative_prompt_2": "a dog"},
        {"prompt": [PROMPT, ""], "negative_prompt": ["blurred", ""], "num_images_per_prompt": 2},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "num_inference_steps": 1},
        {"guidance_rescale": 0.7},
        {"clip_skip": 1},
        {"original_size": (1024, 512), "crops_coords_top_left": (8, 16), "target_size": (256, 512)},
        {
            "negative_original_size": (32, 32),
            "negative_crops_coords_top_left": (4, 5),
            "negative_target_size": (16, 80),
        },
        {"denoising_end": 0.6, "num_inference_steps": 6},
        {"num_images_per_prompt": 2, "generator": lambda: [seeded(1), seeded(2)]},
        {"latents": torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(1))},
        {"timesteps": [900, 500, 20]},
        {"sigmas": [14.0, 3.0, 0.5]},
    ],
)
def test_arguments(base, arguments):
    compare(base, **{"prompt": PROMPT, **SIZE, **arguments})


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_schedulers(base, name):
    before = [pipe.scheduler for pipe in base]
    try:
        with_scheduler(base, name)
        compare(base, prompt=PROMPT, **SIZE)
    finally:
        for pipe, scheduler in zip(base, before, strict=True):
            pipe.scheduler = scheduler


def test_encode_prompt_and_its_states(base):
    ours, reference = base
    options = {"prompt": ["a cat", PROMPT], "negative_prompt": "blurred", "num_images_per_prompt": 2}
    mine = ours.encode_prompt(**options)
    options["negative_prompt"] = ["blurred"] * 2  # the reference refuses one text for two
    for one, other in zip(mine, reference.encode_prompt(**options), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    one = ours.encode_prompt(PROMPT, negative_prompt="blurred")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    compare(base, **dict(zip(names, one, strict=True)), **SIZE)
    from_states = draw(ours, **dict(zip(names, one, strict=True)), **SIZE)
    assert np.array_equal(from_states[0], draw(ours, prompt=PROMPT, negative_prompt="blurred", **SIZE)[0])


def test_negatives_by_text_where_the_folder_says_so(base):
    for pipe, library in zip(base, (minidiff, diffusers), strict=True):
        other = library.StableDiffusionXLPipeline(**pipe.components, force_zeros_for_empty_prompt=False)
        other.set_progress_bar_config(disable=True)
        if library is minidiff:
            ours = other
    compare((ours, other), prompt=PROMPT, **SIZE)
    assert not np.array_equal(draw(ours, prompt=PROMPT, **SIZE)[0], draw(base[0], prompt=PROMPT, **SIZE)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt_2": "blurred"}, "negative_prompt_2 has no effect without negative_prompt"),
        ({"negative_pooled_prompt_embeds": "own"}, "negative_pooled_prompt_embeds has no effect without"),
        ({"negative_crops_coords_top_left": (8, 8)}, "negative_crops_coords_top_left have no effect without"),
        ({"negative_target_size": (8, 8)}, "negative_crops_coords_top_left have no effect without"),
        ({"negative_prompt_2": "blurred", "guidance_scale": 1.0}, "the negative prompt has no effect"),
    ],
)
def test_arguments_without_effect_are_a_warning(base, options, message):
    ours = base[0]
    if "negative_pooled_prompt_embeds" in options:
        options = {"negative_pooled_prompt_embeds": ours.encode_prompt(PROMPT)[3]}
    expected = draw(ours, prompt=PROMPT, **{key: value for key, value in options.items() if "scale" in key}, **SIZE)[0]
    with pytest.warns(UserWarning, match=message) as caught:
        drawn = draw(ours, prompt=PROMPT, **options, **SIZE)[0]
    assert len(caught) == 1 and np.array_equal(drawn, expected)


def test_distilled_unet_reads_the_guidance_scale(base):
    from reference import twins

    config = {**base[1].unet.config, "time_cond_proj_dim": 32}
    reference, ours = twins("UNet2DConditionModel", {k: v for k, v in config.items() if not k.startswith("_")})
    pipes = []
    for pipe, library, unet in zip(base, (minidiff, diffusers), (ours, reference), strict=True):
        pipes.append(library.StableDiffusionXLPipeline(**pipe.components | {"unet": unet}))
        pipes[-1].set_progress_bar_config(disable=True)
    low = compare(pipes, prompt=PROMPT, **SIZE)
    assert not np.array_equal(low[0], compare(pipes, prompt=PROMPT, guidance_scale=8.0, **SIZE)[0])


def test_vae_with_means_and_deviations(base):
    config = {"latents_mean": [-1.6, 1.8, -1.3, 2.5], "latents_std": [8.4, 5.9, 6.5, 5.2]}
    pipes = []
    for pipe, library in zip(base, (minidiff, diffusers), strict=True):
        vae = library.AutoencoderKL.from_config(pipe.vae.config, **config)
        vae.load_state_dict(pipe.vae.state_dict())
        pipes.append(library.StableDiffusionXLPipeline(**pipe.components | {"vae": vae.eval()}))
        pipes[-1].set_progress_bar_config(disable=True)
    compare(pipes, prompt=PROMPT, **SIZE)


def test_saves_load_on_either_side(base, tmp_path):
    picture = draw(base[0], prompt=PROMPT, **SIZE)[0]
    for i, pipe in enumerate(base):
        pipe.save_pretrained(tmp_path / str(i))
        for again in both(tmp_path / str(i)):
            assert np.abs(draw(again, prompt=PROMPT, **SIZE)[0] - picture).max() <= PICTURE


def test_float16_vae_computes_in_float32_where_it_asks_to(base):
    ours = minidiff.StableDiffusionXLPipeline(**base[0].components | {"vae": copy.deepcopy(base[0].vae).half()})
    ours.set_progress_bar_config(disable=True)
    seen = []
    ours.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    exact = draw(base[1], prompt=PROMPT, **SIZE)[0]
    assert np.abs(draw(ours, prompt=PROMPT, **SIZE)[0] - exact).max() <= 2e-2  # the weights are float16 all the same
    assert seen == [torch.float32] and ours.vae.dtype == torch.float16


def test_watermark(base, monkeypatch):
    """What the package's encoder makes of the bytes, blue first; pictures below 256 pixels carry none."""
    module, seen = types.ModuleType("imwatermark"), {}

    class WatermarkEncoder:
        def set_watermark(self, kind, bits):
            seen["bits"] = (kind, bits)

        def encode(self, array, method):
            seen["method"] = method
            return array + np.array([51.0, 0.0, 0.0])  # more blue

    module.WatermarkEncoder = WatermarkEncoder
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "imwatermark", module)
    pictures = torch.zeros(1, 3, 16, 256)
    marked = minidiff.pipelines.stable_diffusion_xl.watermarked(pictures)
    assert torch.allclose(marked[:, 2], pictures[:, 2] + 0.4, atol=1e-6)
    assert torch.allclose(marked[:, :2], pictures[:, :2], atol=1e-6)
    assert seen["bits"][0] == "bits" and len(seen["bits"][1]) == 48 and seen["method"] == "dwtDct"
    small = torch.zeros(1, 3, 16, 64)
    assert minidiff.pipelines.stable_diffusion_xl.watermarked(small) is small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 77, 4)}, "pooled_prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 77, 4)}, "not both"),
        ({}, "give either prompt"),
        ({"prompt": "a", "denoising_end": 1.5}, "denoising_end"),
        ({"prompt": "a", "denoising_end": 0.0}, "denoising_end"),
        ({"prompt": "a", "original_size": 512}, "original_size"),
        ({"prompt": "a", "clip_skip": 99}, "clip_skip"),
        ({"prompt": ["a", "b"], "prompt_2": ["a", "b", "c"]}, "prompt_2"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]}, "negative_prompt"),
        ({"prompt": "a", "height": 63}, "height"),
    ],
)
def test_bad_arguments(base, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        base[0](num_inference_steps=2, **arguments)
