"""The systems of 2021 and 2022 in pixels and in a codebook's latents, beside the reference: narrow, random weights."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from reference import difference, twins
from test_models import noise
from test_pipelines import LATENTS, PICTURE, seeded
from test_unet_variants import NCSNPP

import minidiff

VQ = {
    "block_out_channels": [16, 32, 32],
    "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "num_vq_embeddings": 64,
    "latent_channels": 3,
    "layers_per_block": 1,
}
LATENT_UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def pipelines(name, scheduler, options, **models):
    """`models`: the reference's class and config of each; `watch` is the method whose samples are compared."""
    made = {key: twins(*spec, seed=i) for i, (key, spec) in enumerate(models.items())}
    pipes = []
    for side, library in ((1, minidiff), (0, diffusers)):
        parts = {key: pair[side] for key, pair in made.items()}
        pipes.append(getattr(library, name)(**parts, scheduler=getattr(library, scheduler)(**options)))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes


def watched(pipe, methods, **arguments):
    """The picture, and what the scheduler's methods returned, one after another."""
    steps, scheduler = [], pipe.scheduler
    for method in methods:
        original = getattr(scheduler, method)

        @functools.wraps(original)  # pipelines look at its parameters
        def keep(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            steps.append(out if isinstance(out, torch.Tensor) else out[0])
            return out

        setattr(scheduler, method, keep)
    try:
        picture = pipe(output_type="np", **arguments).images
    finally:
        for method in methods:
            delattr(scheduler, method)
    return picture, steps


def compare(pipes, methods=("step",), **arguments):
    results = []
    for pipe in pipes:
        own = {name: value() if callable(value) else value for name, value in arguments.items()}
        torch.manual_seed(7)
        results.append(watched(pipe, methods, **{"generator": seeded(), **own}))
    (picture, steps), (expected, expected_steps) = results
    assert len(steps) == len(expected_steps) > 0
    assert max(difference(*pair) for pair in zip(steps, expected_steps, strict=True)) <= LATENTS
    assert picture.shape == expected.shape and np.abs(picture - expected).max() <= PICTURE


@torch.no_grad()
def test_vq_model():
    for more in ({}, {"vq_embed_dim": 5, "mid_block_add_attention": False}):
        reference, ours = twins("VQModel", VQ | more)
        x = noise(2, 3, 32, 24)
        latents = reference.encode(x).latents
        assert difference(ours.encode(x).latents, latents) <= 5e-6
        for whole in (False, True):
            expected = reference.decode(latents, force_not_quantize=whole)
            out = ours.decode(latents, force_not_quantize=whole)
            assert difference(out.sample, expected.sample) <= 5e-6
            assert torch.allclose(out.commit_loss, expected.commit_loss)
        assert difference(ours(x).sample, reference(x).sample) <= 5e-6
    with pytest.raises(ValueError, match="h has shape"):
        ours.decode(noise(1, 3, 8, 8))


def test_codebook_learns_and_lets_gradients_through():
    """The encoder's gradient is that of the decoder's input, as if nothing had been replaced."""
    ours = twins("VQModel", VQ)[1]
    h = noise(1, 3, 4, 4).requires_grad_()
    quantized, loss = ours.quantize(h)
    quantized.sum().backward(retain_graph=True)
    assert torch.equal(h.grad, torch.ones_like(h))
    loss.backward()
    assert ours.codebook.weight.grad.abs().max() > 0


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_latent_diffusion(scheduler):
    options = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    pipes = pipelines("LDMPipeline", scheduler, options, vqvae=("VQModel", VQ), unet=("UNet2DModel", LATENT_UNET))
    compare(pipes, num_inference_steps=5, batch_size=2)
    if scheduler == "DDIMScheduler":
        compare(pipes, num_inference_steps=3, eta=0.8)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_super_resolution(scheduler):
    unet = ("UNet2DModel", LATENT_UNET | {"in_channels": 6})
    pipes = pipelines("LDMSuperResolutionPipeline", scheduler, {}, vqvae=("VQModel", VQ), unet=unet)
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    compare(pipes, image=small, num_inference_steps=4)
    compare(pipes, image=noise(2, 3, 8, 6).clamp(-1, 1), num_inference_steps=3)
    with pytest.raises(ValueError, match="image has shape"):
        pipes[0](noise(1, 4, 8, 8))


@pytest.mark.parametrize("correct_steps", [1, 2])
def test_score_sde(correct_steps):
    options = {"correct_steps": correct_steps, "sigma_max": 1348.0, "sampling_eps": 1e-5}
    pipes = pipelines("ScoreSdeVePipeline", "ScoreSdeVeScheduler", options, unet=("UNet2DModel", NCSNPP))
    compare(pipes, ("step_correct", "step_pred"), num_inference_steps=5, batch_size=2)


def test_karras():
    unet = LATENT_UNET | {"sample_size": 16}
    pipes = pipelines("KarrasVePipeline", "KarrasVeScheduler", {}, unet=("UNet2DModel", unet))
    compare(pipes, ("step", "step_correct"), num_inference_steps=5, batch_size=2)


@pytest.mark.parametrize("arguments", [{}, {"eta": 0.7}, {"generator": lambda: [seeded(1), seeded(2)]}])
def test_repaint(arguments):
    pipes = pipelines("RePaintPipeline", "RePaintScheduler", {}, unet=("UNet2DModel", LATENT_UNET))
    hole = (noise(1, 1, 16, 24) > 0).float()
    known = noise(2, 3, 16, 24).clamp(-1, 1)
    run = {"num_inference_steps": 6, "jump_length": 2, "jump_n_sample": 2}
    compare(pipes, ("step", "undo_step"), image=known, mask_image=hole, **run, **arguments)
    if not arguments:
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8))
        mask = Image.fromarray(rng.integers(0, 256, (64, 32), np.uint8))
        compare(pipes, ("step", "undo_step"), image=picture, mask_image=mask, **run)


def test_saves_load_on_either_side(tmp_path):
    pipes = pipelines("LDMPipeline", "DDIMScheduler", {}, vqvae=("VQModel", VQ), unet=("UNet2DModel", LATENT_UNET))
    sde = pipelines("ScoreSdeVePipeline", "ScoreSdeVeScheduler", {"sigma_max": 10.0}, unet=("UNet2DModel", NCSNPP))
    for pair, options in ((pipes, {"num_inference_steps": 3}), (sde, {"num_inference_steps": 2})):
        expected = pair[0](generator=seeded(), output_type="np", **options).images
        for i, pipe in enumerate(pair):
            folder = tmp_path / type(pipe).__name__ / str(i)
            pipe.save_pretrained(folder)
            for library in (minidiff, diffusers):
                again = library.DiffusionPipeline.from_pretrained(folder)
                picture = again(generator=seeded(), output_type="np", **options).images
                assert np.abs(picture - expected).max() <= PICTURE
