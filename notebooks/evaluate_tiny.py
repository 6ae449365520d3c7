"""Says how good the models in the box are, and fails (exit status 1) where they are worse than promised.

tiny-emoji's pictures are read by a network that was trained on renders apart (judge.py). tiny-ddpm's are compared to
all of its drawings (small.py).
"""

import argparse
import sys
import textwrap
from pathlib import Path

import judge
import matplotlib.pyplot as plt
import scenes
import small
import sprites
import torch
from PIL import Image
from scenes import Scenes
from torch import Tensor
from tqdm import tqdm
from train_tiny import Emoji

import minidiff
from minidiff import DDIMPipeline, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline
from minidiff.__main__ import SCHEDULERS

BUNDLED = Path(__file__).parents[1] / "minidiff/bundled"
GUIDANCES, USUAL = (1.0, 3.0, 7.5), 3.0  # the command line's, and the notebooks', is 3; the pipeline's default 7.5
LEAST = {1.0: (0.85, 0.80), 3.0: (0.97, 0.95)}  # right in things and colour: trained, held out
LEAST_STYLE, LEAST_EACH_STYLE, LEAST_PSNR = 0.9, 0.1, 26.0
UNSEEN = {
    "colour": "things never seen on the colour",
    "corner": "things never seen at the place in the style",
    "pair": "things never seen together",
}
OPEN = ["a fox", "a large guitar on a blue background"]  # prompts that leave the style open
FARTHEST = 0.04  # tiny-ddpm's pictures from the nearest drawings, on average
LEAST_SURE, FEWEST = 0.9, 14  # the share that surely shows a thing; different ones of the 16
MOST_COPIES = 0.6  # that lie nearer to a picture that was trained on than to any of as many others


def distances(pictures: Tensor, renders: Tensor) -> Tensor:
    """The root mean square difference of each of (B, 3, H, W) to each of (N, 3, H, W): (B, N)."""
    return torch.cdist(pictures.flatten(1), renders.flatten(1)) / renders[0].numel() ** 0.5


def psnr(pipe: StableDiffusionPipeline, x: Tensor) -> float:
    """The mean over pictures of what the VAE makes of each, in dB."""
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


def right(said: dict[str, Tensor], wanted: Scenes) -> dict[str, float]:
    """The shares of pictures, read by the judge, with the right things and colour, style, size and place.

    Sizes and places are asked of things alone.
    """
    is_right = {head: said[head] == label for head, label in judge.labels(wanted).items()}
    shares = {
        "things and colour": is_right["left"] & is_right["right"] & is_right["colour"],
        "style": is_right["style"],
    }
    if wanted.alone.any():
        shares |= {head: is_right[head][wanted.alone] for head in ("size", "place")}
    return {name: share.float().mean().item() for name, share in shares.items()}


def spread(pictures: Tensor) -> float:
    """The mean distance of two pictures, in the root mean square of [0, 1]."""
    return (distances(pictures, pictures).sum() / (len(pictures) * (len(pictures) - 1))).item()


def percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def copies(pipe: StableDiffusionPipeline, n: int) -> tuple[float, float]:
    """How often a picture is nearest to a training picture, and how often it would be by chance.

    Each of n pictures is drawn from the full words of a scene with one thing. Words leave its height open; some of the
    scenes that remain are in the training set and some are not. A model that copies draws the former; one that learned
    what things look like, and where they may stand, draws all alike.
    """
    pool = Emoji().scenes
    wanted = scenes.trained(n, seed=8, share_alone=1.0)
    pictures = draw(pipe, scenes.prompts(wanted), USUAL, seed=5000)
    found = []
    for i in range(n):
        every = scenes.at_every_height(wanted[i : i + 1])
        same = torch.stack([a == b[:1] for a, b in zip(pool.columns[1:5], every.columns[1:5], strict=True)]).all(dim=0)
        seen = pool[same & (pool.things == every.things[0]).all(dim=1)].pose[:, 0]
        trained = (every.pose[:, None, 0] == seen).all(dim=2).any(dim=1)  # (heights,)
        nearest_one = distances(pictures[i : i + 1], scenes.render(every)).argmin()
        found.append([trained[nearest_one].item(), trained.float().mean().item()])
    share, chance = torch.tensor(found).mean(dim=0).tolist()
    return share, chance


def plot(results: dict[float, dict[str, float]], file: Path) -> None:
    """What guidance trades: what is right, the share of each style where none is asked for, and the spread."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    panels = (
        ("right things and colour", ("trained", "held out")),
        ("styles without a style word", scenes.STYLES),
        ("distance of two seeds", ("spread",)),
    )
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(list(results), [result[name] for result in results.values()], "o-", label=name)
        axis.set(title=title, xlabel="guidance", xticks=list(results))
        if len(names) > 1:
            axis.legend(fontsize=7)
    axes[0].set_ylim(top=1.01)
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def sample_grid(pipe: StableDiffusionPipeline, file: Path) -> None:
    """Seeds in rows, prompts in columns."""
    columns = [
        "a fox",
        "an inked fox",
        "a small rocket on the left",
        "a large guitar",
        "a glossy snail on a pink background",
        "an owl and a key",
        "a flat bus on a yellow background",
        "a detailed crab on the right on a blue background",
    ]
    rows = 6
    pictures = torch.stack([draw(pipe, [text] * rows, USUAL, seed=0) for text in columns], dim=1)
    figure, axes = plt.subplots(rows, len(columns), figsize=(len(columns), rows + 0.8))
    for row, line in enumerate(axes):
        for column, axis in enumerate(line):
            axis.imshow(pictures[row, column].permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title("\n".join(textwrap.wrap(columns[column], 14)), fontsize=7)
            if column == 0:
                axis.set_ylabel(f"seed {row}", fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=110)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize().save(file, optimize=True)  # a third of the bytes


def evaluate_emoji(folder: Path, images: Path, every: int) -> bool:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    reader = judge.load()
    print(f"the judge, on renders: {percent(judge.accuracy(reader))}")
    n = 200 // every
    kinds = {"trained": scenes.trained(n, seed=7), **{kind: scenes.unseen(kind, n) for kind in UNSEEN}}
    x = scenes.render(scenes.join(*kinds.values()))
    decibels = psnr(pipe, x)
    print(f"VAE: {decibels:.1f} dB")
    good, results = decibels >= LEAST_PSNR, {}
    for guidance in GUIDANCES:
        shares = {}
        for kind, wanted in kinds.items():
            said = judge.read(reader, draw(pipe, scenes.prompts(wanted), guidance, seed=0))
            shares[kind] = right(said, wanted)
            print(f"guidance {guidance}, {len(wanted)} {UNSEEN.get(kind, 'trained scenes')}: {percent(shares[kind])}")
        result = {"trained": shares["trained"]["things and colour"]}
        result["held out"] = sum(shares[kind]["things and colour"] for kind in UNSEEN) / len(UNSEEN)
        least = LEAST.get(guidance, (0, 0))
        good &= result["trained"] >= least[0] and result["held out"] >= least[1]
        open_pictures = [draw(pipe, [text] * (200 // every), guidance, seed=1000) for text in OPEN]
        styles = [
            judge.read(reader, pictures)["style"].bincount(minlength=4) / len(pictures) for pictures in open_pictures
        ]
        result |= dict(zip(scenes.STYLES, torch.stack(styles).mean(dim=0).tolist(), strict=True))
        result["spread"] = sum(map(spread, open_pictures)) / len(open_pictures)
        for text, share in zip(OPEN, styles, strict=True):
            print(f"guidance {guidance}, {text!r}: {percent(dict(zip(scenes.STYLES, share.tolist(), strict=True)))}")
        print(f"guidance {guidance}: two seeds of one of these prompts are {result['spread']:.3f} apart", flush=True)
        if guidance == 1:
            good &= min(result[style] for style in scenes.STYLES) >= LEAST_EACH_STYLE
        if guidance == USUAL:
            good &= shares["trained"]["style"] >= LEAST_STYLE
        results[guidance] = result
    share, chance = copies(pipe, n)
    print(f"nearest to a picture that was trained on: {share:.1%}; by chance: {chance:.1%}")
    few = kinds["trained"][: len(kinds["trained"]) // 3]
    for name, keys in SCHEDULERS.values():
        sampler = getattr(minidiff, name).from_config(pipe.scheduler.config, **keys)
        other = StableDiffusionPipeline(
            pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, sampler, requires_safety_checker=False
        )
        other.set_progress_bar_config(disable=True)
        said = judge.read(reader, draw(other, scenes.prompts(few), USUAL, seed=0))
        listed = ", ".join(f"{key}={value!r}" for key, value in keys.items())
        print(f"{name}({listed}), 20 steps, guidance {USUAL}: {percent(right(said, few))}", flush=True)
    plot(results, images / "tiny_emoji_guidance.png")
    sample_grid(pipe, images / "tiny_emoji_samples.png")
    return good


def evaluate_ddpm(folder: Path, images: Path) -> bool:
    """What is drawn, in which styles, and whether it is copied: a model that copies is nearer to what it was trained on
    than to as many pictures that it never saw; one that has learned what may be drawn is as near to either."""
    good = True
    ddpm = DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ddim = DDIMPipeline(ddpm.unet, DDIMScheduler.from_config(ddpm.scheduler.config))
    for words, pipe, n, steps in (("DDIM", ddim, 256, 50), ("DDPM", ddpm, 64, 1000)):
        generator = torch.Generator().manual_seed(0)
        pictures = pipe(batch_size=n, num_inference_steps=steps, generator=generator, output_type="pt").images
        number, distance, sure = small.nearest(pictures)
        thing, style, place = torch.unravel_index(number, small.SHAPE)
        styles = dict(zip(scenes.STYLES, (style.bincount(minlength=4) / n).tolist(), strict=True))
        things, places = len(thing.unique()), len(place.unique())
        copied = small.copied(pictures, number)
        print(f"{words}, {steps} steps: {sure.float().mean():.1%} of {n} pictures surely show a thing")
        print(f"  the nearest drawing is {distance.median():.3f} away (root mean square, of 0..1), in the median")
        print(f"  {things} things, {places} places; {percent(styles)}")
        print(f"  nearer to a picture that was trained on: {copied:.1%}; by chance: 50.0%", flush=True)
        good &= sure.float().mean().item() >= LEAST_SURE and distance.mean().item() <= FARTHEST
        if words == "DDIM":
            good &= things >= FEWEST and min(styles.values()) >= LEAST_EACH_STYLE and copied <= MOST_COPIES
            twice = pictures[:64].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # easier to look at
            sprites.grid(twice).quantize().save(images / "tiny_ddpm_samples.png")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=["tiny-emoji", "tiny-ddpm"], help="default: both")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge an Nth of tiny-emoji's (default: all)")
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
