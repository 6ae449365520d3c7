"""Says how good the models in the box are, and fails (exit status 1) where they are worse than promised.

A picture counts as right when the nearest of all 1,600 renders, in the mean square, is the emoji AND the colour asked
for. `python evaluate_tiny.py`, or with the names of the models.
"""

import argparse
import sys
from pathlib import Path

import sprites
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import DDIMPipeline, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline

BUNDLED = Path(__file__).parents[1] / "minidiff/bundled"
GUIDANCE, CLEANEST = 7.5, 3.0  # the pipeline's default; where the pictures look best
LEAST_TRAINED, LEAST_HELD_OUT, LEAST_PSNR = 0.95, 0.90, 26.0
FARTHEST, FEWEST = 0.14, 32  # tiny-ddpm's pictures from their nearest renders; different ones among 64


def nearest(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Of float (B, 3, H, W) in [0, 1]: the index of the nearest render (B,), and its root mean square distance (B,)."""
    renders = sprites.renders(pictures.shape[-1]).flatten(0, 1).flatten(1) / 255
    distances = torch.cdist(pictures.flatten(1), renders) / renders.shape[1] ** 0.5
    distance, index = distances.min(dim=1)
    return index, distance


def psnr(pipe: StableDiffusionPipeline) -> float:
    """The mean over the held-out renders of what the VAE makes of each, in dB."""
    x = sprites.renders()[sprites.held_out()] / 255
    with torch.no_grad():
        y = pipe.vae.decode(pipe.vae.encode(2 * x - 1).latent_dist.mode()).sample / 2 + 0.5
    return (-10 * (y.clamp(0, 1) - x).square().mean(dim=(1, 2, 3)).log10()).mean().item()


def draw(pipe: StableDiffusionPipeline, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
    """(B, 3, 64, 64) in [0, 1], each picture from a seed of its own: `seed`, `seed` + 1, ..."""
    batches = []
    for first in tqdm(range(0, len(prompts), 64), f"guidance {guidance_scale}", leave=False):
        batch = prompts[first : first + 64]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        options = {"num_inference_steps": 20, "generator": generators, "output_type": "pt"}
        batches.append(pipe(batch, guidance_scale=guidance_scale, **options).images)
    return torch.cat(batches)


def share_right(pipe: StableDiffusionPipeline, mask: Tensor, guidance_scale: float) -> float:
    """The share of the pairs in `mask` (160, 10) that come out as asked."""
    prompts = [sprites.prompts(name, colour)[0] for name, colour in sprites.pairs(mask)]
    index, _ = nearest(draw(pipe, prompts, guidance_scale, seed=0))
    return (index == mask.flatten().nonzero().squeeze(1)).float().mean().item()


def evaluate_emoji(folder: Path, images: Path, every: int) -> bool:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    held_out = sprites.held_out()
    trained = ~held_out & (torch.arange(held_out.numel()).view_as(held_out) % every == 0)
    decibels = psnr(pipe)
    print(f"VAE, held-out renders: {decibels:.1f} dB")
    shares = {}
    for guidance_scale in (1.0, CLEANEST, GUIDANCE):
        for words, mask in (("trained", trained), ("held-out", held_out)):
            shares[words] = share_right(pipe, mask, guidance_scale)
            print(f"guidance {guidance_scale}: {shares[words]:.1%} of the {mask.sum()} {words} pairs are right")
    wanted = sprites.pairs(held_out)[::5] + sprites.pairs(~held_out)[20::44][:32]
    samples = draw(pipe, [sprites.prompts(*pair)[0] for pair in wanted], CLEANEST, seed=0)
    sprites.grid(samples).quantize().save(images / "tiny_emoji_samples.png")
    return decibels >= LEAST_PSNR and shares["trained"] >= LEAST_TRAINED and shares["held-out"] >= LEAST_HELD_OUT


def evaluate_ddpm(folder: Path, images: Path) -> bool:
    good = True
    ddpm = DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ddim = DDIMPipeline(ddpm.unet, DDIMScheduler.from_config(ddpm.scheduler.config))
    for words, pipe, steps in (("DDIM", ddim, 50), ("DDPM", ddpm, 1000)):
        generator = torch.Generator().manual_seed(0)
        pictures = pipe(batch_size=64, num_inference_steps=steps, generator=generator, output_type="pt").images
        index, distance = nearest(pictures)
        print(
            f"{words}, {steps} steps: the nearest render is {distance.mean():.3f} away (root mean square, of 0..1)"
            f" on average, {distance.median():.3f} in the median; {len(index.unique())} different ones in 64 pictures"
        )
        if words == "DDIM":
            sprites.grid(pictures).quantize().save(images / "tiny_ddpm_samples.png")
        good &= distance.mean().item() <= FARTHEST and len(index.unique()) >= FEWEST
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny-emoji"])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge every Nth trained pair (default: all)")
    parser.add_argument("--bundled", type=Path, default=BUNDLED, help="the folder that holds the models")
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images", help="for the sample grids")
    options = parser.parse_args()
    options.images.mkdir(exist_ok=True)
    good = True
    if "tiny-emoji" in options.models:
        good &= evaluate_emoji(options.bundled / "tiny-emoji", options.images, options.every)
    if "tiny-ddpm" in options.models:
        good &= evaluate_ddpm(options.bundled / "tiny-ddpm", options.images)
    sys.exit(0 if good else "worse than promised")


if __name__ == "__main__":
    main()
