"""Says how good the models in the box are, and fails (exit status 1) where they are worse than promised.

A picture counts as right when the nearest of all renders, in the mean square, is the scene asked for: the emoji (both,
in their order) AND the colour. There are 1,600 renders of one emoji and 256,000 of two.
"""

import argparse
import sys
from pathlib import Path

import sprites
import torch
from torch import Tensor
from tqdm import tqdm
from train_tiny import trained

from minidiff import DDIMPipeline, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline

BUNDLED = Path(__file__).parents[1] / "minidiff/bundled"
GUIDANCE, USUAL = 7.5, 3.0  # the pipeline's default; the command line's, and the notebooks'
LEAST_TRAINED, LEAST_HELD_OUT, LEAST_PSNR = 0.95, 0.90, 26.0
FARTHEST = 0.04  # tiny-ddpm's pictures from their nearest renders, on average
LEAST_SURE, FEWEST = 0.9, 32  # the share that is surely an emoji; different ones among 64


def distances(pictures: Tensor, renders: Tensor) -> Tensor:
    """The root mean square difference of each of (B, 3, H, W) to each of (N, 3, H, W): (B, N)."""
    return torch.cdist(pictures.flatten(1), renders.flatten(1)) / renders[0].numel() ** 0.5


def nearest(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of float (B, 3, H, W) in [0, 1], among renders of one emoji: the nearest one's index, and its distance, (B,).

    The third result is true where a picture is surely that emoji: where the distance is less than half of that from
    the nearest render to any of another emoji, so that the picture can't lie nearer to one of those.
    """
    renders = sprites.renders(pictures.shape[-1]).flatten(0, 1) / 255
    distance, index = distances(pictures, renders).min(dim=1)
    from_there = distances(renders[index], renders)
    other = torch.arange(len(renders)) // 10 != (index // 10)[:, None]
    return index, distance, distance < from_there.where(other, torch.inf).min(dim=1).values / 2


def nearest_scene(pictures: Tensor) -> Tensor:
    """Of float (B, 3, 64, 64) in [0, 1]: the scene (B, 3) whose render is nearest, with one emoji or with two.

    A duet's squared distance is the mean of its halves': the best of all is the best left one and the best right one.
    """
    one = distances(pictures, sprites.renders().flatten(0, 1) / 255).square()
    halves = sprites.halves().flatten(0, 1) / 255
    left, right = (  # values and indices, (B, 10) each
        distances(half, halves).square().unflatten(1, (160, 10)).min(dim=1) for half in pictures.chunk(2, dim=3)
    )
    duet, colour = ((left.values + right.values) / 2).min(dim=1)
    row = torch.arange(len(pictures))
    two = torch.stack([left.indices[row, colour], right.indices[row, colour], colour], dim=1)
    single, index = one.min(dim=1)
    alone = torch.stack([index // 10, torch.full_like(index, sprites.ALONE), index % 10], dim=1)
    return torch.where((single < duet)[:, None], alone, two)


def psnr(pipe: StableDiffusionPipeline, scenes: Tensor) -> float:
    """The mean over the renders of `scenes` of what the VAE makes of each, in dB."""
    x = sprites.render(scenes) / 255
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


def share_right(pipe: StableDiffusionPipeline, scenes: Tensor, guidance_scale: float) -> float:
    """The share of `scenes` (N, 3) that come out as asked."""
    pictures = draw(pipe, [sprites.scene_prompts(scene)[0] for scene in scenes.tolist()], guidance_scale, seed=0)
    return (nearest_scene(pictures) == scenes).all(dim=1).float().mean().item()


def evaluate_emoji(folder: Path, images: Path, every: int) -> bool:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    held_out = sprites.held_out()
    duets, unseen_duets = trained()[(~held_out).sum() :], sprites.duets(unseen=True)
    kinds = {  # scenes, and the least share of them that must be right
        "trained pairs": (sprites.alone(~held_out)[::every], LEAST_TRAINED),
        "held-out pairs": (sprites.alone(held_out), LEAST_HELD_OUT),
        "trained duets": (duets[:: len(duets) // 320][:320], LEAST_TRAINED),
        "held-out duets": (unseen_duets[:: len(unseen_duets) // 320][:320], LEAST_HELD_OUT),
    }
    good = True
    for kind in ("held-out pairs", "held-out duets"):
        decibels = psnr(pipe, kinds[kind][0])
        print(f"VAE, {kind}: {decibels:.1f} dB")
        good &= decibels >= LEAST_PSNR
    for guidance_scale in (1.0, USUAL, GUIDANCE):
        for kind, (scenes, least) in kinds.items():
            share = share_right(pipe, scenes, guidance_scale)
            print(f"guidance {guidance_scale}: {share:.1%} of the {len(scenes)} {kind} are right", flush=True)
            good &= guidance_scale == 1 or share >= least
    wanted = torch.cat([scenes[torch.linspace(0, len(scenes) - 1, 16).long()] for scenes, _ in kinds.values()])
    samples = draw(pipe, [sprites.scene_prompts(scene)[0] for scene in wanted.tolist()], USUAL, seed=0)
    sprites.grid(samples).quantize().save(images / "tiny_emoji_samples.png")
    return good


def evaluate_ddpm(folder: Path, images: Path) -> bool:
    good = True
    ddpm = DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ddim = DDIMPipeline(ddpm.unet, DDIMScheduler.from_config(ddpm.scheduler.config))
    for words, pipe, steps in (("DDIM", ddim, 50), ("DDPM", ddpm, 1000)):
        generator = torch.Generator().manual_seed(0)
        pictures = pipe(batch_size=64, num_inference_steps=steps, generator=generator, output_type="pt").images
        index, distance, sure = nearest(pictures)
        print(
            f"{words}, {steps} steps: the nearest render is {distance.mean():.3f} away (root mean square, of 0..1)"
            f" on average, {distance.median():.3f} in the median; {sure.sum()} of 64 pictures are surely that emoji;"
            f" {len(index.unique())} different ones"
        )
        if words == "DDIM":
            twice = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # easier to look at
            sprites.grid(twice).quantize().save(images / "tiny_ddpm_samples.png")
        good &= distance.mean().item() <= FARTHEST and len(index.unique()) >= FEWEST
        good &= sure.float().mean().item() >= LEAST_SURE
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=["tiny-emoji", "tiny-ddpm"], help="default: both")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge every Nth trained pair (default: all)")
    parser.add_argument("--bundled", type=Path, default=BUNDLED, help="the folder that holds the models")
    parser.add_argument(
        "--images", type=Path, default=Path(__file__).parent / "images", help="where the sample grids go"
    )
    options = parser.parse_args()
    options.images.mkdir(exist_ok=True)
    good = True
    if options.model != "tiny-ddpm":
        good &= evaluate_emoji(options.bundled / "tiny-emoji", options.images, options.every)
    if options.model != "tiny-emoji":
        good &= evaluate_ddpm(options.bundled / "tiny-ddpm", options.images)
    sys.exit(0 if good else "worse than promised")


if __name__ == "__main__":
    main()
