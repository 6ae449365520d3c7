"""Trains the two models in the box on a CPU: `python train_tiny.py tiny-emoji` and `python train_tiny.py tiny-ddpm`."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import sprites
import torch
import torch.nn.functional as F
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

BUNDLED = Path(__file__).parents[1] / "minidiff/bundled"
SHOWN = 32  # pictures in the grids that show progress
FASTER = torch.autocast("cpu", torch.bfloat16)  # for convolutions of many pixels; small ones are no faster in it
DUETS = 16_384  # scenes with two emoji whose latents are computed once


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


def train_vae(steps: int, batch: int, folder: Path) -> AutoencoderKL:
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
    singles, duets = sprites.alone(~sprites.held_out()), sprites.duets(unseen=False)

    def loss() -> Tensor:
        single, duet = torch.randint(len(singles), (batch // 2,)), torch.randint(len(duets), (batch - batch // 2,))
        x = sprites.render(torch.cat([singles[single], duets[duet]])) / 127.5 - 1
        with FASTER:
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded.float(), x) + 1e-6 * posterior.kl().mean()

    def show() -> Tensor:
        return vae.decode(encode(vae, sprites.render(unseen()))).sample / 2 + 0.5

    train(vae, loss, show, steps, 6e-3, folder)
    return vae


def train_decoder(vae: AutoencoderKL, steps: int, batch: int, folder: Path) -> None:
    """The decoder once more, alone, on the latents' means: what the UNet learns to make has none of their noise."""
    pictures = sprites.render(trained())
    latents, unseen_latents = encode(vae, pictures), encode(vae, sprites.render(unseen()))
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss() -> Tensor:
        picture = half_alone(batch, len(pictures))
        with FASTER:
            decoded = vae.decode(latents[picture]).sample
        return F.mse_loss(decoded.float(), pictures[picture] / 127.5 - 1)

    train(decoder, loss, lambda: vae.decode(unseen_latents).sample / 2 + 0.5, steps, 3e-3, folder)


def unseen() -> Tensor:
    """Scenes (SHOWN, 3) for the grids, which are never trained on: half with one emoji, half with two."""
    both = sprites.alone(sprites.held_out()), sprites.duets(unseen=True)
    return torch.cat([scenes[torch.linspace(0, len(scenes) - 1, SHOWN // 2).long()] for scenes in both])


def trained() -> Tensor:
    """Scenes (N, 3): all with one emoji that are trained on, then DUETS with two; more wouldn't fit into memory."""
    duets = sprites.duets(unseen=False)
    some = torch.randperm(len(duets), generator=torch.Generator().manual_seed(0))[:DUETS]
    return torch.cat([sprites.alone(~sprites.held_out()), duets[some]])


def half_alone(batch: int, scenes: int) -> Tensor:
    """The numbers of `batch` random scenes out of `trained`: half of them with one emoji, half with two."""
    first = scenes - DUETS
    return torch.cat([torch.randint(first, (batch // 2,)), torch.randint(first, scenes, (batch - batch // 2,))])


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The latents (B, 16, 8, 8) of uint8 pictures (B, 3, 64, 64)."""
    return torch.cat([vae.encode(batch / 127.5 - 1).latent_dist.mode() for batch in pictures.split(64)])


def train_tokenizer() -> CLIPTokenizer:
    """Byte pairs until every word of the prompts is one token, in CLIP's form: its alphabet comes first.

    Then come the words in alphabetical order: their ids are the same in every run, the order of the merges isn't.
    """
    words, trained = sprites.words(), Tokenizer(models.BPE(end_of_word_suffix="</w>"))
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
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, merges, model_max_length=16)


def train_unet(vae: AutoencoderKL, steps: int, batch: int, folder: Path) -> StableDiffusionPipeline:
    """Text encoder and UNet together, on v-prediction (Progressive distillation, arXiv 2202.00512, appendix D)."""
    tokenizer = train_tokenizer()
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

    # The VAE is finished: every picture's latents, and every prompt's tokens, are computed once
    scenes = trained()
    latents = encode(vae, sprites.render(scenes))
    scaling_factor = 1 / latents.std().item()
    latents *= scaling_factor
    prompts = [[*sprites.scene_prompts(scene), ""] for scene in scenes.tolist()]
    tokens = tokenizer(
        [prompt for ways in prompts for prompt in ways], padding="max_length", return_tensors="pt"
    ).input_ids
    tokens = tokens.unflatten(0, (len(prompts), -1))  # (pictures, ways to ask, 16)
    often = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])  # the last is the empty prompt, for guidance

    def loss() -> Tensor:
        picture = half_alone(batch, len(latents))
        way = torch.multinomial(often, batch, replacement=True)
        t = torch.randint(1000, (batch,))
        x0, noise = latents[picture], torch.randn(batch, *latents.shape[1:])
        states = text_encoder(tokens[picture, way]).last_hidden_state
        predicted = unet(scheduler.add_noise(x0, noise, t), t, states).sample
        return F.mse_loss(predicted, scheduler.get_velocity(x0, noise, t))

    vae.config = vae.Config.read({**vae.config, "scaling_factor": scaling_factor})
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    wanted = [sprites.scene_prompts(scene)[0] for scene in unseen().tolist()]

    def show() -> Tensor:
        options = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "pt"}
        return pipe(wanted, generator=torch.Generator().manual_seed(0), **options).images

    train(nn.ModuleList([unet, text_encoder]), loss, show, steps, 3e-3, folder, ema=0.998)
    return pipe


def posterior(noisy: Tensor, alpha_bar: Tensor, pictures: Tensor) -> Tensor:
    """p(x0 | x_t), as (B, N), of each of `pictures` (N, 3, H, W) behind `noisy` (B, 3, H, W), at `alpha_bar` (B,).

    Bayes' rule: in proportion to exp(-|x_t - c x0|^2 / 2 s^2), with c^2 = alpha_bar and s^2 = 1 - alpha_bar.
    """
    c, x, x0 = alpha_bar[:, None] ** 0.5, noisy.flatten(1), pictures.flatten(1)
    return ((c * x @ x0.T - c**2 * x0.square().sum(dim=1) / 2) / (1 - c**2)).softmax(dim=1)


def train_ddpm(steps: int, batch: int, folder: Path) -> DDPMPipeline:
    """The pictures themselves, at 32x32 and without words. The model says x0, not the noise.

    Each picture is one of few, noise is anything: a network this thin learns the one in a fraction of the time that it
    takes for the other (Li and He 2025, arXiv:2511.13720). Since all pictures are known, so is the best guess, their
    mean given x_t: asked for that, the model ends where it would anyhow, without the noise of each draw (Xu et al.
    2023, arXiv:2302.00670).

    And what is asked of the network at its end is asked of it on the way too, each time through one layer that is
    thrown away afterwards. The middle and the levels of the way up sketch the picture (deep supervision, Lee et al.
    2014, arXiv:1409.5185), and the middle names the emoji and the colour (after Yu et al. 2024, arXiv:2410.06940).
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
    shown = ~sprites.held_out()
    pictures = sprites.renders(32)[shown] / 127.5 - 1
    names, colours = (F.one_hot(*of).float() for of in zip(shown.nonzero().T, shown.shape, strict=True))
    labels = torch.cat([names, colours], dim=1)  # of each picture: 160 columns and 10
    name = nn.Conv2d(128, labels.shape[1], kernel_size=1)
    stages = {unet.mid: 128, unet.up[0]: 128, unet.up[1]: 128, unet.up[2]: 64}  # channels at 4x4, 8x8, 16x16, 32x32
    blocks = [8, 4, 2, 1]  # the side of the block of pixels that one place stands for
    sketch = nn.ModuleList(nn.Conv2d(c, 3 * n * n, kernel_size=1) for c, n in zip(stages.values(), blocks, strict=True))
    gave = {}
    hooks = [stage.register_forward_hook(lambda stage, inputs, h: gave.update({stage: h})) for stage in stages]

    def loss() -> Tensor:
        x0 = pictures[torch.randint(len(pictures), (batch,))]
        # Logit-normal (Esser et al. 2024, arXiv:2403.03206, section 3.1): most draws where noise hides the picture from
        # the eye, and yet only one is possible
        normal = torch.special.ndtri((torch.arange(batch) + torch.rand(batch)) / batch)  # one from each equal share
        t = (1000 * torch.sigmoid(0.4 + 1.2 * normal)).long().clamp(max=999)
        noisy, alpha_bar = scheduler.add_noise(x0, torch.randn_like(x0), t), scheduler.alphas_cumprod[t]
        weights = posterior(noisy, alpha_bar, pictures)
        wanted = (weights @ pictures.flatten(1)).view_as(noisy)

        def error(picture: Tensor) -> Tensor:  # x0's over 1 - alpha_bar is v's; without end where there is no noise
            return ((picture - wanted).square().mean(dim=(1, 2, 3)) / (1 - alpha_bar).clamp(min=0.1)).mean()

        with FASTER:
            predicted = unet(noisy, t).sample.float()
        sketches = [
            F.pixel_shuffle(layer(gave[stage].float()), n)  # (B, 3 n^2, 32 / n, 32 / n) -> (B, 3, 32, 32)
            for stage, layer, n in zip(stages, sketch, blocks, strict=True)
        ]
        scores = name(gave[unet.mid].float()).split(shown.shape, dim=1)  # (B, 160, 4, 4), (B, 10, 4, 4)
        named = (weights @ labels)[:, :, None, None].expand(-1, -1, *scores[0].shape[2:]).split(shown.shape, dim=1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["tiny-emoji", "tiny-ddpm"])
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
    torch.manual_seed(0)
    if options.model == "tiny-emoji":
        steps, batch = options.steps or (3000, 1000, 6000), options.batch or (16, 16, 64)
        vae = train_vae(steps[0], batch[0], options.runs / "tiny-emoji-vae")
        train_decoder(vae, steps[1], batch[1], options.runs / "tiny-emoji-decoder")
        pipe = train_unet(vae, steps[2], batch[2], options.runs / "tiny-emoji-unet")
    else:
        (steps,), (batch,) = options.steps or (10_000,), options.batch or (32,)
        pipe = train_ddpm(steps, batch, options.runs / "tiny-ddpm")
    out = options.out or BUNDLED / options.model
    pipe.to(torch.float16).save_pretrained(out)
    config = out / "text_encoder" / "config.json"  # of all parts the reference takes this one in the type named here
    if config.exists():
        config.write_text(config.read_text().replace('"torch_dtype": "float16"', '"torch_dtype": "float32"'))
    if options.model == "tiny-emoji":
        known = {"things": sprites.NAMES, "colours": list(sprites.COLOURS), "words": sprites.words()}
        (out / "known.json").write_text(json.dumps(known) + "\n")  # for `python -m minidiff --list`


if __name__ == "__main__":
    main()
