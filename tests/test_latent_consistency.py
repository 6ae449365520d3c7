"""Latent consistency models beside the reference's pipelines, latents and path ends at every step."""

import diffusers
import numpy as np
import pytest
import torch
from layouts import make_folder
from reference import narrow_config, twins
from test_pipelines import LATENTS, PICTURE, PROMPT, both, seeded
from test_xl_pictures import picture

import minidiff


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    pipes = both(make_folder("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd") / "folder"))
    unets = twins(
        "UNet2DConditionModel", narrow_config("stable-diffusion-v1-5", "unet")[1] | {"time_cond_proj_dim": 24}
    )
    made = []
    for pipe, library, unet in zip(pipes, (minidiff, diffusers), unets[::-1], strict=True):
        own = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
        own |= {"unet": unet, "scheduler": library.LCMScheduler.from_config(pipe.scheduler.config)}
        made.append(own | {"safety_checker": None, "feature_extractor": None})
    return made


def pipelines(parts, name):
    pipes = [getattr(library, name)(**own) for library, own in zip((minidiff, diffusers), parts, strict=True)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def compare(pipes, **arguments):
    results = []
    for pipe in pipes:
        steps = []

        def keep(_pipe, _i, _t, tensors, steps=steps):
            steps.append((tensors["latents"], tensors["denoised"]))
            return tensors

        own = {name: value() if callable(value) else value for name, value in arguments.items()}
        own = {"generator": seeded(), "callback_on_step_end_tensor_inputs": ["latents", "denoised"]} | own
        results.append((pipe(PROMPT, callback_on_step_end=keep, output_type="np", **own).images, steps))
    (ours, steps), (reference, expected) = results
    assert np.abs(ours - reference).max() <= PICTURE
    for mine, theirs in zip(steps, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert (one - other).abs().max() <= LATENTS * other.abs().max()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 1},
        {"num_inference_steps": 8, "original_inference_steps": 100, "guidance_scale": 1.7},
        {"timesteps": [999, 579, 179]},
        {"num_images_per_prompt": 2, "generator": lambda: [seeded(1), seeded(2)], "guidance_scale": 0.0},
        {"latents": torch.randn(1, 4, 8, 6, generator=seeded(3))},
    ],
)
def test_from_text(parts, arguments):
    compare(pipelines(parts, "LatentConsistencyModelPipeline"), height=64, width=48, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 0.3, "num_inference_steps": 2},
        {"strength": 1.0, "num_images_per_prompt": 2},
        {"strength": 0.5, "latents": torch.randn(1, 4, 8, 6, generator=seeded(3))},
        {"image": picture(51, 70)},
    ],
)
def test_from_a_picture(parts, arguments):
    compare(pipelines(parts, "LatentConsistencyModelImg2ImgPipeline"), **{"image": picture(), **arguments})


def test_saves_load_on_either_side(parts, tmp_path):
    arguments = {"generator": seeded, "height": 64, "width": 48}
    pipes = pipelines(parts, "LatentConsistencyModelPipeline")
    for i, pipe in enumerate(pipes):
        pipe.save_pretrained(tmp_path / str(i))
        again = both(tmp_path / str(i))
        compare([again[0], pipes[1]], **arguments)
        compare([pipes[0], again[1]], **arguments)


def test_wrong_parts(parts):
    unet = minidiff.UNet2DConditionModel.from_config({**parts[0]["unet"].config, "time_cond_proj_dim": None})
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        minidiff.LatentConsistencyModelPipeline(**parts[0] | {"unet": unet})
    with pytest.raises(ValueError, match="LCMScheduler"):
        minidiff.LatentConsistencyModelPipeline(**parts[0] | {"scheduler": minidiff.DDIMScheduler()})
    pipe = pipelines(parts, "LatentConsistencyModelPipeline")[0]
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(PROMPT, num_inference_steps=51)
