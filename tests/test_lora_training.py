"""A LoRA trained here teaches the bundled model a thing that it has never seen, and draws the same in the reference."""

import diffusers
import numpy as np
import torch
import train_lora

import minidiff


def distance(pictures):
    """Of each picture to the windmill that is most like it, in 0..1."""
    turns = np.arange(0, 90, 6)
    found = []
    for colour, picture in zip(train_lora.COLOURS, pictures, strict=True):
        targets = np.stack([np.asarray(train_lora.windmill(colour, turn), dtype=float) for turn in turns])
        found.append(np.abs(targets - np.asarray(picture, dtype=float)).mean(axis=(1, 2, 3)).min() / 255)
    return np.array(found)


def losses(pipe, latents, states):
    with torch.no_grad():
        return torch.stack([train_lora.loss(pipe, latents, states, seeded(seed)) for seed in range(2)]).mean().item()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_it_learns_and_the_reference_draws_the_same(tmp_path):
    folder = minidiff.bundled("tiny-emoji")
    ours = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for pipe in (ours, reference):
        pipe.set_progress_bar_config(disable=True)
    latents, states = train_lora.lessons(ours)
    before, drawn_before = losses(ours, latents, states), train_lora.pictures(ours)
    weights = {name: tensor.clone() for name, tensor in ours.unet.state_dict().items()}
    train_lora.teach(ours, steps=60)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.unet.state_dict().items())
    drawn = train_lora.pictures(ours)
    assert losses(ours, latents, states) < 0.6 * before  # measured: 0.38
    nearer = distance(drawn) / distance(drawn_before)
    assert nearer.max() < 0.95 and nearer.mean() < 0.75  # measured: 0.80 and 0.63
    ours.save_lora_weights(tmp_path, ours.unet)
    reference.load_lora_weights(tmp_path)
    options = {"num_inference_steps": 5, "output_type": "np"}
    one, other = (pipe(train_lora.prompt("blue"), generator=seeded(1), **options).images for pipe in (ours, reference))
    assert np.abs(one - other).max() <= 1e-4
    ours.disable_lora()
    for one, other in zip(train_lora.pictures(ours), drawn_before, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
