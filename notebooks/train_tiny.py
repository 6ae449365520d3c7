"""Trains the two models in the box on a CPU: `python train_tiny.py tiny-emoji` and `python train_tiny.py tiny-ddpm`.

`python train_tiny.py --pictures DIR --out FOLDER` makes another tiny-emoji, of your own pictures.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import scenes
import small
import sprites
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTokenizer,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from minidiff.layers import SLOW

BUNDLED = Path(__file__).parents[1] / "minidiff/bundled"
SHOWN = 32  # pictures in the grids that show progress
# For convolutions of many pixels, where the CPU has such products; small ones are no faster in it
FASTER = torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 not in SLOW)
POOL = 40_000  # scenes that tiny-emoji is trained on
VIEWS = 16  # of each of your own pictures


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every weight matrix is made orthogonal, so that each direction is learned at one pace.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the step size of Liu et al. 2025
    (arXiv:2502.16982, eq. 4), at which AdamW's learning rates fit. Convolutions count as matrices (out, in * h * w).
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(average, group["momentum"]).flatten(1))
                scale = 0.2 * math.sqrt(max(update.shape))
                weight.sub_(update.view_as(weight), alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: five Newton-Schulz steps, with the quintic of Jordan et al.

    A step is x <- q(x x^T) x. All q's are made from the first x x^T alone, which is smaller than x.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    square = x @ x.T
    identity = product = torch.eye(len(x))
    for _ in range(5):
        q = 3.4445 * identity - 4.7750 * square + 2.0315 * square @ square
        square, product = q @ square @ q, q @ product
    x = product @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weights of convolutions and linear layers, and AdamW, at half its rate, for all other parameters."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    matrices = [layer.weight for layer in layers if min(layer.weight.flatten(1).shape) >= 8]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr / 2, betas=(0.9, 0.99), weight_decay=0.0)]


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    show: Callable[[], Tensor],
    steps: int,
    lr: float,
    folder: Path,
    ema: float = 0.0,
) -> None:
    """Minimises `loss()` over the parameters of `model`, which end as their moving average of decay `ema`.

    Warms up for 50 steps, then follows half a cosine. Writes losses and seconds to folder/loss.csv, and every 500 steps
    a checkpoint, from which the next call resumes, and what the averaged model can do: pictures of `show()`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    peaks = {optimizer: optimizer.param_groups[0]["lr"] for optimizer in optimizers(model, lr)}
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, seconds, checkpoint = 0, 0.0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first, seconds, average = saved["steps"], saved["seconds"], saved["average"]
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(peaks, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    started = time.time() - seconds
    progress = tqdm(range(first, steps), folder.name, initial=first, total=steps)
    for step in progress:
        pace = min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        for optimizer, peak in peaks.items():
            optimizer.param_groups[0]["lr"] = peak * pace
        value = loss()
        model.zero_grad()
        value.backward()
        for optimizer in peaks:
            optimizer.step()
        decay = min(ema, (step + 1) / (step + 10))
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        if step % 10 == 0:
            progress.set_postfix_str(f"loss {value.item():.4f}", refresh=False)
            with open(folder / "loss.csv", "a") as log:
                print(step, f"{value.item():.5f}", f"{time.time() - started:.0f}", sep=",", file=log)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            weights = {name: p.clone() for name, p in model.state_dict().items()}
            state = {"steps": step + 1, "seconds": time.time() - started, "model": weights, "average": average}
            torch.save({**state, "optimizers": [optimizer.state_dict() for optimizer in peaks]}, checkpoint)
            model.load_state_dict(average)
            with torch.no_grad():
                sprites.grid(show()).save(folder / "samples.png")
            model.load_state_dict(weights)
    model.load_state_dict(average)


class Data(Protocol):
    """Pictures and the words for them; both tiny-emoji's scenes and a folder of pictures are such."""

    words: list[str]  # all that prompts are made of
    length: int  # the most tokens of a prompt

    def __len__(self) -> int: ...

    def pictures(self, index: Tensor) -> Tensor:
        """Float (B, 3, 64, 64) in [0, 1]."""

    def prompts(self, index: Tensor) -> list[str]:
        """One for each picture, in words that may differ from call to call; "" in one of ten, for guidance."""

    def shown(self) -> tuple[Tensor, list[str]]:
        """SHOWN pictures for the grids that show progress, and full prompts for them."""


class Emoji:
    """POOL random scenes: finite, so that one can look whether a picture is a copy of any."""

    words, length = scenes.words(), 16

    def __init__(self):
        self.scenes = scenes.trained(POOL)

    def __len__(self) -> int:
        return len(self.scenes)

    def pictures(self, index: Tensor) -> Tensor:
        return scenes.render(self.scenes[index])

    def prompts(self, index: Tensor) -> list[str]:
        return scenes.random_prompts(self.scenes[index])

    def shown(self) -> tuple[Tensor, list[str]]:
        unseen = scenes.join(*(scenes.unseen(kind, SHOWN // 2) for kind in ("corner", "pair")))
        return scenes.render(unseen), scenes.prompts(unseen)


class Folder:
    """Your own pictures, as 64x64. Each is seen in VIEWS views, moved and enlarged a little, so that few suffice.

    Prompts are the lines {"file_name": ..., "text": ...} of metadata.jsonl, or, where there is none, the files' names:
    "a red boat.png", and "a red boat 2.png" or "a red boat_2.png" for another one.
    """

    length = 77

    def __init__(self, folder: Path):
        metadata = folder / "metadata.jsonl"
        if metadata.exists():
            entries = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
            wrong = [entry for entry in entries if {"file_name", "text"} - entry.keys()]
            if wrong:
                raise SystemExit(f"{metadata}: the line {wrong[0]} must have file_name and text")
            texts = {folder / entry["file_name"]: entry["text"] for entry in entries}
        else:
            files = sorted(
                file for file in folder.glob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
            )
            texts = {file: re.sub(r"[\s_-]*\d*$", "", file.stem).replace("_", " ") for file in files}
        if not texts:
            raise SystemExit(f"{folder}: there are no pictures in it (png, jpg, webp), and no metadata.jsonl")
        self.texts = list(texts.values())
        self.words = sorted({word for text in self.texts for word in re.findall(r"[^\W_]+", text.lower())})
        self.squares = torch.stack([self.square(file) for file in texts])
        self.views = torch.rand(len(texts) * VIEWS, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @staticmethod
    def square(file: Path) -> Tensor:
        """The middle of a picture, (3, 64, 64); what is transparent becomes white."""
        with Image.open(file) as picture:
            whole = picture.convert("RGBA")
        paper = Image.new("RGBA", whole.size, "white")
        paper.alpha_composite(whole)
        fitted = ImageOps.fit(paper.convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255

    def __len__(self) -> int:
        return len(self.views)

    def pictures(self, index: Tensor) -> Tensor:
        x, y, zoom = self.views[index].T
        size = 0.95 + 0.05 * zoom  # of what is seen of the square; the rest is room to move
        zero = torch.zeros_like(size)
        rows = [torch.stack([size, zero, (1 - size) * x], 1), torch.stack([zero, size, (1 - size) * y], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), [len(index), 3, 64, 64], align_corners=False)
        return F.grid_sample(self.squares[index % len(self.texts)], grid, padding_mode="border", align_corners=False)

    def prompts(self, index: Tensor) -> list[str]:
        kept = (torch.rand(len(index)) >= 0.1).tolist()
        return [self.texts[i % len(self.texts)] if keep else "" for i, keep in zip(index.tolist(), kept, strict=True)]

    def shown(self) -> tuple[Tensor, list[str]]:
        some = torch.linspace(0, len(self.texts) - 1, SHOWN).long()
        return self.squares[some], [self.texts[i] for i in some]


def train_vae(data: Data, steps: int, batch: int, folder: Path) -> AutoencoderKL:
    """Reconstruction in the mean square, plus a small KL term: it bounds the latents and closes channels not needed."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,  # with more, channels are normed apart, and how bright each was, a colour, is lost
        sample_size=64,
        force_upcast=False,
    )
    with torch.no_grad():  # begin with a log variance near -6: at 0, noise would drown what the encoder says
        vae.quant_conv.weight[16:] *= 0.1
        vae.quant_conv.bias[16:] = -6
    vae.to(memory_format=torch.channels_last)
    unseen = data.shown()[0]

    def loss() -> Tensor:
        x = 2 * data.pictures(torch.randint(len(data), (batch,))) - 1
        with FASTER:
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded.float(), x) + 1e-6 * posterior.kl().mean()

    def show() -> Tensor:
        return vae.decode(encode(vae, unseen)).sample / 2 + 0.5

    train(vae, loss, show, steps, 6e-3, folder)
    return vae


def train_decoder(vae: AutoencoderKL, data: Data, steps: int, batch: int, folder: Path) -> None:
    """The decoder once more, alone, on the latents' means: what the UNet learns to make has none of their noise."""
    unseen_latents = encode(vae, data.shown()[0])
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss() -> Tensor:
        pictures = data.pictures(torch.randint(len(data), (batch,)))
        latents = encode(vae, pictures)
        with FASTER:
            decoded = vae.decode(latents).sample
        return F.mse_loss(decoded.float(), 2 * pictures - 1)

    train(decoder, loss, lambda: vae.decode(unseen_latents).sample / 2 + 0.5, steps, 3e-3, folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The latents (B, 16, 8, 8) of pictures (B, 3, 64, 64) in [0, 1]."""
    with FASTER:
        return torch.cat([vae.encode(2 * batch - 1).latent_dist.mode() for batch in pictures.split(64)]).float()


def train_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """Byte pairs until every word of the prompts is one token, in CLIP's form: its alphabet comes first.

    Then come the words in alphabetical order: their ids are the same in every run, the order of the merges isn't.
    """
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [f"{sign}</w>" for sign in alphabet]
    pieces = sorted(
        {"".join(pair) for pair in merges}, key=lambda piece: (piece.removesuffix("</w>") not in words, piece)
    )
    tokens = [*alphabet, *pieces, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length=length)


def train_unet(vae: AutoencoderKL, data: Data, steps: int, batch: int, folder: Path) -> StableDiffusionPipeline:
    """Text encoder and UNet together, on v-prediction (Progressive distillation, arXiv 2202.00512, appendix D).

    Two levels of the UNet sketch x0 too, each through one layer that is thrown away afterwards: see `train_ddpm`.
    """
    tokenizer = train_tokenizer(data.words, data.length)
    text_encoder = CLIPTextModel.from_config(
        {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)

    # The VAE is finished: every picture's latents are computed once
    latents = torch.cat([encode(vae, data.pictures(index)) for index in torch.arange(len(data)).split(64)])
    scaling_factor = 1 / latents.std().item()
    latents *= scaling_factor
    stages = {unet.mid: 2, unet.up[0]: 1}  # how many latents' sides one place of theirs stands for
    sketch = nn.ModuleList(nn.Conv2d(128, 16 * n * n, kernel_size=1) for n in stages.values())
    gave = {}
    hooks = [stage.register_forward_hook(lambda stage, inputs, h: gave.update({stage: h})) for stage in stages]

    def loss() -> Tensor:
        index = torch.randint(len(latents), (batch,))
        tokens = tokenizer(data.prompts(index), padding="max_length", return_tensors="pt").input_ids
        even = (torch.arange(batch) + torch.rand(batch)) / batch  # one from each equal share
        middle = torch.sigmoid(torch.special.ndtri(even) - 0.2)  # where noise hides some of the picture
        t = (1000 * torch.where(torch.arange(batch) % 2 == 0, even, middle)).long().clamp(max=999)
        x0, noise = latents[index], torch.randn(batch, 16, 8, 8)
        states = text_encoder(tokens).last_hidden_state
        predicted = unet(scheduler.add_noise(x0, noise, t), t, states).sample
        sketches = 0.0
        for stage, layer, n in zip(stages, sketch, stages.values(), strict=True):
            sketches += F.mse_loss(F.pixel_shuffle(layer(gave[stage]), n), x0)
        return F.mse_loss(predicted, scheduler.get_velocity(x0, noise, t)) + 0.3 * sketches

    vae.config = vae.Config.read({**vae.config, "scaling_factor": scaling_factor})
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    wanted = data.shown()[1]

    def show() -> Tensor:
        options = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
        return pipe(wanted, generator=torch.Generator().manual_seed(0), **options).images

    train(nn.ModuleList([unet, text_encoder, sketch]), loss, show, steps, 3e-3, folder, ema=0.998)
    for hook in hooks:
        hook.remove()
    return pipe


def train_ddpm(steps: int, batch: int, folder: Path) -> DDPMPipeline:
    """The pictures themselves, at 32x32 and without words. The model says x0, not the noise.

    Drawings are few and colours have three numbers, noise is anything: a network this thin learns the one in a fraction
    of the time that it takes for the other (Li and He 2025, arXiv:2511.13720).

    And what is asked of the network at its end is asked of it on the way too, each time through one layer that is
    thrown away afterwards. The middle and the levels of the way up sketch the picture (deep supervision, Lee et al.
    2014, arXiv:1409.5185), and the middle names the thing and its style (after Yu et al. 2024, arXiv:2410.06940).
    """
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=1,
    ).to(memory_format=torch.channels_last)
    # On linear betas a quarter of all timesteps of so small a picture are nothing but noise; on the cosine few are
    # (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.2)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    pipe = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    numbers, colours = small.trained()
    asked = small.SHAPE[:2]  # 16 things and 4 styles
    name = nn.Conv2d(128, sum(asked), kernel_size=1)
    stages = {unet.mid: 128, unet.up[0]: 128, unet.up[1]: 128, unet.up[2]: 64}  # channels at 4x4, 8x8, 16x16, 32x32
    blocks = [8, 4, 2, 1]  # the side of the block of pixels that one place stands for
    sketch = nn.ModuleList(nn.Conv2d(c, 3 * n * n, kernel_size=1) for c, n in zip(stages.values(), blocks, strict=True))
    gave = {}
    hooks = [stage.register_forward_hook(lambda stage, inputs, h: gave.update({stage: h})) for stage in stages]

    def loss() -> Tensor:
        index = torch.randint(small.POOL, (batch,))
        x0 = 2 * small.render(numbers[index], colours[index]) - 1
        # Logit-normal (Esser et al. 2024, arXiv:2403.03206, section 3.1): most draws where noise hides the picture from
        # the eye, and yet only one drawing is possible
        normal = torch.special.ndtri((torch.arange(batch) + torch.rand(batch)) / batch)  # one from each equal share
        t = (1000 * torch.sigmoid(0.4 + 1.2 * normal)).long().clamp(max=999)
        noisy, alpha_bar = scheduler.add_noise(x0, torch.randn_like(x0), t), scheduler.alphas_cumprod[t]

        def error(picture: Tensor) -> Tensor:  # x0's over 1 - alpha_bar is v's; without end where there is no noise
            return ((picture - x0).square().mean(dim=(1, 2, 3)) / (1 - alpha_bar).clamp(min=0.1)).mean()

        with FASTER:
            predicted = unet(noisy, t).sample.float()
        sketches = [
            F.pixel_shuffle(layer(gave[stage].float()), n)  # (B, 3 n^2, 32 / n, 32 / n) -> (B, 3, 32, 32)
            for stage, layer, n in zip(stages, sketch, blocks, strict=True)
        ]
        thing, style, _ = torch.unravel_index(numbers[index], small.SHAPE)
        scores = name(gave[unet.mid].float()).split(asked, dim=1)  # (B, 16, 4, 4), (B, 4, 4, 4)
        named = [label[:, None, None].expand(-1, *scores[0].shape[2:]) for label in (thing, style)]
        return error(predicted) + 0.3 * sum(map(error, sketches)) + 0.02 * sum(map(F.cross_entropy, scores, named))

    def show() -> Tensor:
        faster = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
        faster.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return faster(batch_size=SHOWN, num_inference_steps=50, generator=generator, output_type="pt").images

    train(nn.ModuleList([unet, sketch, name]), loss, show, steps, 4e-3, folder, ema=0.998)
    for hook in hooks:
        hook.remove()
    return pipe


def save(pipe: StableDiffusionPipeline | DDPMPipeline, out: Path) -> None:
    """Half as many bytes, and a folder that the reference loads without arguments.

    It takes the text encoder, alone of all parts, in the type that its config names: float16 as saved would meet
    float32 in the UNet.
    """
    pipe.to(torch.float16).save_pretrained(out)
    config = out / "text_encoder/config.json"
    if config.exists():
        settings = json.loads(config.read_text()) | {"torch_dtype": "float32"}
        config.write_text(json.dumps(settings, indent=2) + "\n")


def known() -> dict[str, list[str]]:
    """What tiny-emoji can be asked for, for `python -m minidiff --list` and its hints."""
    return {
        "things": scenes.THINGS,
        "styles": scenes.STYLES,
        "sizes": scenes.SIZES,
        "places": list(scenes.PLACES.values()),
        "backgrounds": scenes.COLOURS,
        "words": scenes.words(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=["tiny-emoji", "tiny-ddpm"], default="tiny-emoji")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="pictures of your own, for a tiny-emoji of them")
    parser.add_argument("--steps", type=int, nargs="+", help="of VAE, decoder and UNet, or of tiny-ddpm's one UNet")
    parser.add_argument("--batch", type=int, nargs="+", help="pictures a step, likewise")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where logs and checkpoints lie; what has begun there goes on"
    )
    parser.add_argument("--out", type=Path, help="folder for the trained model (default: minidiff/bundled/MODEL)")
    options = parser.parse_args()
    stages = 3 if options.model == "tiny-emoji" else 1
    if any(len(numbers) != stages for numbers in (options.steps, options.batch) if numbers):
        parser.error(f"{options.model} is trained in {stages} stage(s): --steps and --batch take a number for each")
    if options.pictures and (options.model == "tiny-ddpm" or not options.out):
        parser.error("--pictures needs --out, and makes a model like tiny-emoji, not like tiny-ddpm")
    torch.manual_seed(0)
    out = options.out or BUNDLED / options.model
    if options.model == "tiny-ddpm":
        (steps,), (batch,) = options.steps or (7_500,), options.batch or (16,)
        save(train_ddpm(steps, batch, options.runs / "tiny-ddpm"), out)
        return
    data = Folder(options.pictures) if options.pictures else Emoji()
    runs = options.runs / (out.name if options.pictures else options.model)
    steps = options.steps or ((500, 150, 450) if options.pictures else (4500, 900, 8500))
    batch = options.batch or (16, 16, 64)
    vae = train_vae(data, steps[0], batch[0], Path(f"{runs}-vae"))
    train_decoder(vae, data, steps[1], batch[1], Path(f"{runs}-decoder"))
    save(train_unet(vae, data, steps[2], batch[2], Path(f"{runs}-unet")), out)
    if not options.pictures:
        (out / "known.json").write_text(json.dumps(known()) + "\n")


if __name__ == "__main__":
    main()
