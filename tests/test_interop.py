"""Parts of the reference in minidiff's pipelines, and minidiff's in the reference's: the same pictures."""

import diffusers
import numpy as np
import pytest
import torch

import minidiff

PICTURE = 1e-4
SAMPLERS = sorted(
    name for name in minidiff.schedulers.__all__ if hasattr(diffusers, name) and not getattr(minidiff, name).own_loop
)


def draw(pipe, steps=5):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=steps, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def folder():
    return minidiff.bundled("tiny-emoji")


@pytest.fixture(scope="module")
def ours(folder):
    return minidiff.DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return diffusers.DiffusionPipeline.from_pretrained(folder)  # without arguments, as its documentation does


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_what_the_references_does(ours, reference, name):
    """On a trained model, in every combination: ours and the reference's pipeline, ours and the reference's sampler."""
    mine = getattr(minidiff, name).from_config(ours.scheduler.config)
    theirs = getattr(diffusers, name).from_config(reference.scheduler.config)
    pictures = {}
    for pipe in (ours, reference):
        original = pipe.scheduler
        for scheduler in (mine, theirs):
            pipe.scheduler = scheduler
            pictures[pipe is ours, scheduler is mine] = draw(pipe)
        pipe.scheduler = original
    expected = pictures[False, False]
    assert np.isfinite(expected).all()
    for which, picture in pictures.items():
        assert np.abs(picture - expected).max() < PICTURE, which


def test_a_model_of_the_reference_serves_in_our_pipeline(ours, reference):
    pipe = minidiff.StableDiffusionPipeline(**{**ours.components, "unet": reference.unet})
    assert np.abs(draw(pipe) - draw(ours)).max() < PICTURE


def test_a_scheduler_of_the_reference_serves_in_our_constructor(ours):
    scheduler = diffusers.DDIMScheduler.from_config(dict(ours.scheduler.config), steps_offset=0)
    pipe = minidiff.StableDiffusionPipeline(**{**ours.components, "scheduler": scheduler})
    assert pipe.scheduler.config["steps_offset"] == 1  # mended, as the reference does
    assert np.isfinite(draw(pipe)).all()
