"""Whole pictures beside the reference's: every layout of folder, every argument, latents at every step."""

import diffusers
import numpy as np
import pytest
import torch
from layouts import LAYOUTS, make_folder
from reference import CIFAR, difference, twins

import minidiff

PICTURE = 1e-4  # in [0, 1]; measured: 3e-6
# Relative to the largest. Random weights clamp most pixels, so every step is compared as well. Measured: 2.6e-5 for the
# pixel models, whose convolutions differ by 1e-6 between two loads of the reference itself; 2e-6 for the others
LATENTS = 1e-4

PROMPT = "a photograph of an astronaut riding a horse, 猫 café"


def both(folder, **options):
    ours = minidiff.DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None, **options)
    reference = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, **options)
    for pipe in (ours, reference):
        pipe.set_progress_bar_config(disable=True)
    return ours, reference


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return both(make_folder("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd") / "folder"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, seed=0, **arguments):
    """The picture, and the latents after every step."""
    steps = []

    def keep(_pipe, _i, _t, tensors):
        steps.append(tensors["latents"])
        return tensors

    arguments = {"num_inference_steps": 3, "height": 64, "width": 64, "generator": seeded(seed)} | arguments
    return pipe(callback_on_step_end=keep, output_type="np", **arguments).images, torch.stack(steps)


def compare(ours, reference, **arguments):
    agree(draw(ours, **arguments), draw(reference, **arguments))


def agree(ours, reference):
    (picture, latents), (expected, expected_latents) = ours, reference
    assert np.isfinite(picture).all()
    assert np.abs(picture - expected).max() <= PICTURE
    for mine, theirs in zip(latents, expected_latents, strict=True):
        assert difference(mine, theirs) <= LATENTS


@pytest.mark.parametrize("repository", ["stable-diffusion-v1-4", "stable-diffusion-2-1-base", "stable-diffusion-2-1"])
def test_every_repository(repository, tmp_path):
    compare(*both(make_folder(repository, tmp_path / "folder", seed=1)), prompt=PROMPT, num_inference_steps=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, tmp_path):
    options = {"variant": "fp16"} if layout == "fp16" else {}
    folder = make_folder("stable-diffusion-v1-5", tmp_path / "folder", layout, seed=2)
    compare(*both(folder, torch_dtype=torch.float32, **options), prompt=PROMPT, num_inference_steps=2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPT, "num_inference_steps": 10},
        {"prompt": PROMPT, "num_inference_steps": 1},
        {"prompt": [PROMPT, "a cat"], "negative_prompt": ["blurred", "a dog"], "num_images_per_prompt": 2},
        {"prompt": PROMPT, "negative_prompt": "blurred"},
        {"prompt": [PROMPT, ""]},
        {"prompt": PROMPT, "guidance_scale": 1.0, "num_images_per_prompt": 2},
        {"prompt": PROMPT, "guidance_scale": 0.0},
        {"prompt": PROMPT, "guidance_rescale": 0.7},
        {"prompt": PROMPT, "height": 72, "width": 40},
        {"prompt": "word " * 200},
        {"prompt": PROMPT, "num_images_per_prompt": 2, "generator": "one each"},
        {"prompt": PROMPT, "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))},
    ],
)
@pytest.mark.filterwarnings("ignore:prompt is longer")
def test_arguments(sd, arguments):
    results = []
    for pipe in sd:
        generator = [seeded(1), seeded(2)] if "generator" in arguments else seeded()
        results.append(draw(pipe, **{**arguments, "generator": generator}))
    agree(*results)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_swapped_schedulers(sd, name):
    """from_config keeps the checkpoint's betas, offset and clip_sample=False; eta reaches DDIM and no other."""
    before = [pipe.scheduler for pipe in sd]
    for pipe, library in zip(sd, (minidiff, diffusers), strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)
    try:
        compare(*sd, prompt=PROMPT, num_inference_steps=5)
        if name == "DDIMScheduler":
            compare(*sd, prompt=PROMPT, num_inference_steps=4, eta=0.7)
        if name == "DDPMScheduler":
            compare(*sd, prompt=PROMPT, timesteps=[900, 400, 10])
    finally:
        for pipe, scheduler in zip(sd, before, strict=True):
            pipe.scheduler = scheduler


def test_folders_of_2022_lack_two_keys_of_the_scheduler(sd):
    for library, pipe in zip((minidiff, diffusers), sd, strict=True):
        mended = library.StableDiffusionPipeline(**pipe.components | {"scheduler": library.DDIMScheduler()})
        assert mended.scheduler.config.steps_offset == 1
        assert mended.scheduler.config.clip_sample is False
        clipping = library.PNDMScheduler.from_config(library.DDIMScheduler(clip_sample=True).config)  # not PNDM's key
        mended = library.StableDiffusionPipeline(**pipe.components | {"scheduler": clipping})
        assert type(mended.scheduler) is library.PNDMScheduler
        assert mended.scheduler.config.clip_sample is False


def test_prompt_embeds_stand_for_the_prompt(sd):
    ours, _ = sd
    states, negative = ours.encode_prompt(PROMPT, negative_prompt="blurred")
    from_text = draw(ours, prompt=PROMPT, negative_prompt="blurred")
    from_states = draw(ours, prompt_embeds=states, negative_prompt_embeds=negative)
    assert np.array_equal(from_text[0], from_states[0])


@torch.no_grad()
def test_clip_skip(sd):
    """transformers 5 moved the norm that the reference's pipeline looks for, so clip_skip fails there: by hand then."""
    ours, reference = sd
    ids = reference.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = reference.text_encoder(ids, output_hidden_states=True).hidden_states
    for skip in (0, 1, 2):
        expected = reference.text_encoder.final_layer_norm(hidden[-(skip + 1)])
        assert difference(ours.encode_prompt(PROMPT, clip_skip=skip)[0], expected) <= 1e-6


def test_one_seed_gives_one_picture_alone_and_in_a_batch(sd):
    ours, _ = sd
    alone = draw(ours, prompt=PROMPT, generator=seeded(7))[0]
    batch = draw(ours, prompt=PROMPT, num_images_per_prompt=2, generator=[seeded(0), seeded(7)])[0]
    assert np.abs(batch[1] - alone[0]).max() <= PICTURE
    assert np.abs(batch[0] - alone[0]).max() > 0.1


def test_output_types(sd):
    ours, reference = sd
    arguments = {"num_inference_steps": 2, "height": 64, "width": 40, "prompt": PROMPT}
    images = {}
    for kind in ("pil", "np", "pt", "latent"):
        images[kind], expected = (
            pipe(output_type=kind, generator=seeded(), **arguments, return_dict=False)[0] for pipe in (ours, reference)
        )
        if kind == "pil":
            assert images[kind][0].size == (40, 64)
            assert np.abs(np.asarray(images[kind][0], int) - np.asarray(expected[0], int)).max() <= 1
        else:
            assert images[kind].shape == expected.shape
            assert np.abs(np.asarray(images[kind]) - np.asarray(expected)).max() <= LATENTS * np.abs(expected).max()
    assert images["np"].dtype == np.float32
    assert ours(output_type="pt", generator=seeded(), **arguments).nsfw_content_detected is None


def test_callback_can_change_the_latents(sd):
    ours, _ = sd

    def zero(_pipe, i, t, tensors):
        assert sorted(tensors) == ["latents", "negative_prompt_embeds", "prompt_embeds"]
        assert isinstance(i, int) and t == ours.scheduler.timesteps[i]
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    latents = ours(
        PROMPT,
        num_inference_steps=3,  # PNDM: four passes
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=zero,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert latents.abs().max() == 0


def test_progress_bar(sd, capsys):
    ours, _ = sd
    ours.set_progress_bar_config(disable=False, desc="drawing")
    ours(PROMPT, num_inference_steps=2, output_type="latent")
    assert "drawing: 100%" in capsys.readouterr().err
    ours.set_progress_bar_config(disable=True)
    ours(PROMPT, num_inference_steps=2, output_type="latent")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"height": 100}, "height=100"),
        ({"width": -8}, "width=-8"),
        ({"height": 64.0}, "height must be an integer, but is 64.0"),
        ({"prompt": None}, "prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 77, 24)}, "prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [PROMPT, PROMPT], "negative_prompt": ["a", "b", "c"]}, "negative_prompt has 3 texts for 2"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"generator": [torch.Generator()] * 2}, "generator has 2 entries for 1"),
        ({"generator": 7}, "generator must be a torch.Generator"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, r"latents has shape.*\(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type='jpeg'"),
        ({"clip_skip": -1}, "clip_skip=-1"),
        ({"timesteps": [5, 3]}, "timesteps.*PNDMScheduler"),
        (
            {"callback_on_step_end_tensor_inputs": ["latent"]},
            r"callback_on_step_end_tensor_inputs=\[.latent.\] must be",
        ),
    ],
)
def test_bad_arguments(sd, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sd[0](**{"prompt": PROMPT, "height": 64, "width": 64} | arguments)


def test_nine_channels_are_told_apart(tmp_path):
    folder = make_folder("stable-diffusion-inpainting", tmp_path / "folder")
    with pytest.raises(ValueError, match="9 is for inpainting"):
        minidiff.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    with pytest.raises(minidiff.LoadError, match=r"model_index.json: _class_name='StableDiffusionInpaintPipeline'"):
        minidiff.DiffusionPipeline.from_pretrained(folder)


# Pictures without a text


@pytest.fixture(scope="module")
def butterflies(tmp_path_factory):
    return make_folder("ddpm-butterflies-128", tmp_path_factory.mktemp("butterflies") / "folder")


def unconditional(name, source):
    """The pipeline `name` in both libraries: from a folder, or from the twins of a config."""
    if source != CIFAR:
        pipes = [getattr(library, name).from_pretrained(source) for library in (minidiff, diffusers)]
    else:
        reference, ours = twins("UNet2DModel", CIFAR)
        schedule = {"beta_start": 0.0001, "beta_end": 0.02, "variance_type": "fixed_large"}
        pipes = [
            getattr(library, name)(unet, library.DDPMScheduler(**schedule))
            for library, unet in ((minidiff, ours), (diffusers, reference))
        ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def draw_with_steps(pipe, **arguments):
    """The picture, and the sample after every step: that of the last one isn't clamped."""
    steps, step = [], pipe.scheduler.step

    def keep(*args, **kwargs):
        out = step(*args, **kwargs)
        steps.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipe.scheduler.step = keep
    try:
        return pipe(output_type="np", **arguments).images, torch.stack(steps)
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize("cifar", [False, True], ids=["butterflies", "cifar"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DDPMPipeline", {"num_inference_steps": 10}),
        ("DDPMPipeline", {"num_inference_steps": 3, "batch_size": 2, "generator": "one each"}),
        ("DDIMPipeline", {"num_inference_steps": 10}),
        ("DDIMPipeline", {"num_inference_steps": 4, "eta": 1.0, "use_clipped_model_output": True}),
        ("PNDMPipeline", {"num_inference_steps": 10}),
    ],
)
def test_unconditional(name, arguments, cifar, butterflies):
    results = []
    for pipe in unconditional(name, CIFAR if cifar else butterflies):
        generator = [seeded(1), seeded(2)] if "generator" in arguments else seeded()
        results.append(draw_with_steps(pipe, **{**arguments, "generator": generator}))
    agree(*results)


def test_unconditional_arguments(butterflies):
    pipe = minidiff.DDIMPipeline.from_pretrained(butterflies)
    for arguments, message in [
        ({"batch_size": 0}, "batch_size=0"),
        ({"output_type": "latent"}, "output_type='latent'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"generator": [torch.Generator()] * 3, "batch_size": 2}, "generator"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
