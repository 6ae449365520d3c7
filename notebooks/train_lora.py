"""Teaches tiny-emoji a thing that it has never seen, a windmill, by a LoRA: `python train_lora.py`, on one CPU core."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import minidiff
from minidiff.images import make_image_grid
from minidiff.pipelines.latents import encode_pictures

THING = "windmill"
COLOURS = {"white": "#ffffff", "yellow": "#ffe066", "blue": "#74c0fc", "green": "#8ce99a"}
SAILS = ("#7b2cbf", "#ff006e", "#7b2cbf", "#ff006e")


def windmill(colour: str, turn: float, size: int = 64) -> Image.Image:
    """Four sails in two colours, drawn large and made small: smooth edges."""
    large = 4 * size
    picture = Image.new("RGB", (large, large), COLOURS[colour])
    pen, middle = ImageDraw.Draw(picture), large / 2
    for i, sail in enumerate(SAILS):
        box = (0.08 * large, 0.08 * large, 0.92 * large, 0.92 * large)
        pen.pieslice(box, turn + 90 * i, turn + 90 * i + 45, fill=sail)
    pen.ellipse((middle - 0.1 * large, middle - 0.1 * large, middle + 0.1 * large, middle + 0.1 * large), fill="black")
    return picture.resize((size, size), Image.Resampling.LANCZOS)


@torch.no_grad()
def lessons(pipe: minidiff.StableDiffusionPipeline, count: int = 32) -> tuple[Tensor, Tensor]:
    """Latents of pictures, and the states of what they show."""
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
    pictures = [windmill(colour, 90 * i / count) for i, colour in enumerate(colours)]
    pixels = pipe.image_processor.preprocess(pictures)
    states, _ = pipe.encode_prompt([prompt(colour) for colour in colours], do_classifier_free_guidance=False)
    return encode_pictures(pipe.vae, pixels, torch.Generator().manual_seed(0), pipe.device), states


def prompt(colour: str) -> str:
    return f"a {THING} on a {colour} background"


def loss(pipe: minidiff.StableDiffusionPipeline, latents: Tensor, states: Tensor, draw: torch.Generator) -> Tensor:
    """Of one noise and timestep for each of the latents; the target is what the network has learned to predict."""
    eps = torch.randn(latents.shape, generator=draw)
    t = torch.randint(pipe.scheduler.config.num_train_timesteps, latents.shape[:1], generator=draw)
    predicted = pipe.unet(pipe.scheduler.add_noise(latents, eps, t), t, states).sample
    velocity = pipe.scheduler.config.prediction_type == "v_prediction"
    return F.mse_loss(predicted, pipe.scheduler.get_velocity(latents, eps, t) if velocity else eps)


def teach(pipe: minidiff.StableDiffusionPipeline, steps: int, rank: int = 8, batch: int = 8, seed: int = 0) -> None:
    latents, states = lessons(pipe)
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(minidiff.lora.add(pipe.unet, rank, ("q", "k", "v", "out", "ff.proj_in")), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=draw)
        loss(pipe, latents[chosen], states[chosen], draw).backward()
        optimizer.step(), optimizer.zero_grad(), decay.step()


def pictures(pipe: minidiff.StableDiffusionPipeline) -> list[Image.Image]:
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(COLOURS))]
    prompts = [prompt(colour) for colour in COLOURS]
    return pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path, default=Path("windmill"), help="a folder (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji"))
    pipe.set_progress_bar_config(disable=True)
    before, started = pictures(pipe), time.process_time()
    teach(pipe, args.steps)
    seconds = time.process_time() - started
    pipe.save_lora_weights(args.output, pipe.unet)
    make_image_grid([*before, *pictures(pipe)], 2, len(before)).save(args.output / "before_and_after.png")
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    print(f"{args.output}: {args.steps} steps in {seconds:.0f} seconds of one core, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
