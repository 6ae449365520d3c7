"""The stages of `verify` and `bench`: what runs on the components of a folder and on its pipeline, of either side.

The reference and minidiff have the same public surface, so that one function runs on the object of either. Which
functions a component is for is said by one table, `STAGES`, by its class.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .sides import REFERENCE_FAILS, SAME_PARTS, TEXTS, Inputs, Side, our_class

WIDTH = 52  # of the names in what is printed
VAES, TEXT_ENCODERS = ("vae", "vqvae"), ("text_encoder", "text_encoder_2", "bert")


# What runs on a component


def tokenize(tokenizer: Any, inputs: Inputs) -> dict[str, Any]:
    cut = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"whole": [torch.tensor(ids) for ids in tokenizer(TEXTS).input_ids], "cut and padded": cut}


def token_ids(encoder: Any, inputs: Inputs) -> Tensor:
    """Ids of texts of usual length, empty, and too long, as a CLIP tokenizer makes them: a start, words, an end."""
    c, end = encoder.config, encoder.config.vocab_size - 1  # the largest, by which CLIP finds it
    ids = torch.full((3, c.max_position_embeddings), end)
    ids[:, 0] = end - 1
    for row, words in zip(ids, (8, 0, c.max_position_embeddings - 2), strict=True):
        row[1 : words + 1] = torch.randint(end - 1, (words,), generator=inputs.generator())
    return ids.to(inputs.device)


def encode_text(encoder: Any, inputs: Inputs) -> dict[str, Any]:
    ids = token_ids(encoder, inputs)
    if type(encoder).__name__ == "LDMBertModel":
        return {"states": encoder(ids)[0]}
    out = encoder(ids, output_hidden_states=True)
    layers = out.hidden_states[:-1]  # the last one is the next line's, before the norm
    result = {"each layer": layers, "states": out.last_hidden_state}
    return result | ({"projected": out.text_embeds} if hasattr(out, "text_embeds") else {"pooled": out.pooler_output})


def predict(unet: Any, inputs: Inputs, timesteps: tuple[int, ...] = (981, 500, 1)) -> dict[str, Any]:
    """What the network says, early, midway and late."""
    c, t = unet.config, torch.tensor(timesteps, device=inputs.device)
    sample = inputs.randn(len(t), c.in_channels, *_pair(c.sample_size or 64))
    return {"": list(unet(sample, t, **conditions(c, inputs, len(t))).sample)}


def conditions(c: Any, inputs: Inputs, n: int) -> dict[str, Any]:
    """What a network of this config reads beside `n` samples, all of it random."""
    options: dict[str, Any] = {}
    if c.get("cross_attention_dim"):
        options["encoder_hidden_states"] = inputs.randn(n, 77, c.cross_attention_dim, seed=2)
    if c.get("num_class_embeds"):  # x4: how much the small picture is noised
        options["class_labels"] = torch.arange(20, 20 + n, device=inputs.device)
    if c.get("addition_embed_type") == "text_time":  # XL: pooled text; original size, crop, target size
        pooled = inputs.randn(n, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim, seed=1)
        sizes = torch.tensor([1024, 768, 64, 32, 1024, 896], device=inputs.device).repeat(n, 1)
        options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return options


def steer(net: Any, inputs: Inputs) -> dict[str, Any]:
    """A ControlNet's residuals, in both of its modes."""
    c, t = net.config, torch.tensor([981, 1], device=inputs.device)
    sample, control = inputs.randn(2, c.in_channels, 24, 16), inputs.randn(2, c.conditioning_channels, 192, 128, seed=3)
    result = {}
    for label, guess_mode in (("residuals", False), ("guess mode", True)):
        options = {"guess_mode": guess_mode, "conditioning_scale": 0.8, "return_dict": False}
        down, mid = net(sample, t, controlnet_cond=control, **conditions(c, inputs, 2), **options)
        result[label] = [*down, mid]
    return result


def plan(scheduler: Any, inputs: Inputs) -> dict[str, Any]:
    scheduler.set_timesteps(inputs.steps)
    result = {"timesteps": scheduler.timesteps}
    if hasattr(scheduler, "set_sigmas"):  # score SDE plans twice
        scheduler.set_sigmas(inputs.steps)
        result["levels"] = scheduler.discrete_sigmas
    return result


def step_names(scheduler: Any) -> list[str]:
    """A scheduler's methods that take a sample onwards: score SDE has two."""
    return [name for name in ("step", "step_correct", "step_pred") if hasattr(scheduler, name)]


def step_through(scheduler: Any, inputs: Inputs) -> dict[str, Any]:
    """A whole trajectory; the same predictions, and the same noise where the scheduler draws any, for both sides."""
    plan(scheduler, inputs)
    samples = [inputs.randn(2, 4, 16, 16)]
    steps = [getattr(scheduler, name) for name in step_names(scheduler)]
    for i, t in enumerate(scheduler.timesteps, 1):
        predicted = inputs.randn(2, 4, 16, 16, seed=i)
        for step in steps:
            known = inspect.signature(step).parameters
            options = {"timestep": t} if "timestep" in known else {}
            options |= {"generator": inputs.generator(i)} if "generator" in known else {}
            samples.append(step(model_output=predicted, sample=samples[-1], **options).prev_sample)
    return {f"{len(scheduler.timesteps)} steps": samples}


def encode_and_decode(vae: Any, inputs: Inputs) -> dict[str, Any]:
    c = vae.config
    size = _pair(c.sample_size)
    encoded = vae.encode(inputs.randn(1, c.in_channels, *size).clamp(-1, 1))
    if hasattr(encoded, "latents"):  # VQModel's
        result = {"encode": encoded.latents}
    else:
        dist = encoded.latent_dist
        sampled = dist.sample(inputs.generator())
        result = {"encode, mean": dist.mean, "encode, log variance": dist.logvar, "encode, sampled": sampled}
    return result | {"decode": vae.decode(random_latents(vae, inputs)).sample}


def random_latents(vae: Any, inputs: Inputs) -> Tensor:
    size = (n // factor_of(vae) for n in _pair(vae.config.sample_size))
    return inputs.randn(1, vae.config.latent_channels, *size, seed=1)


def factor_of(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def read_pictures(processor: Any, inputs: Inputs) -> dict[str, Any]:
    pictures = [inputs.picture(300, 200), inputs.picture(150, 224), inputs.picture(64, 512)]
    return {"pixels": torch.as_tensor(processor(pictures, return_tensors="pt")["pixel_values"])}


def look(checker: Any, inputs: Inputs) -> dict[str, Any]:
    """What it sees in two pictures, and its flags."""
    seen = inputs.randn(2, 3, 224, 224)
    tower = checker.vision if hasattr(checker, "vision") else checker.vision_model
    flags = checker(clip_input=seen, images=torch.ones(2, 3, 8, 8))[1]
    return {"embeddings": checker.visual_projection(tower(seen)[1]), "flags": torch.tensor(flags)}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# What runs on a pipeline


def call_arguments(pipe: Any, inputs: Inputs) -> dict[str, Any]:
    """Of all that pipelines take, what this one's call takes."""
    factor = next(map(factor_of, parts_of(pipe, VAES).values()), 1)
    side = 32 if "Upscale" in type(pipe).__name__ else factor * _pair(pipe.unet.config.sample_size or 64)[0]
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2] = 255
    every = {
        "prompt": TEXTS[0],
        "negative_prompt": "blurry",
        "guidance_scale": 5.0,
        **dict.fromkeys(("image", "control_image"), inputs.picture(side, side)),
        "mask_image": Image.fromarray(mask),
        "strength": 0.8 if inputs.steps > 1 else 1.0,
        "num_inference_steps": inputs.steps,
        "generator": inputs.generator(),
        "output_type": "np",
    }
    return {name: every[name] for name in inspect.signature(pipe.__call__).parameters if name in every}


def parts_of(pipe: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def draw(pipe: Any, inputs: Inputs) -> dict[str, Any]:
    """A picture, what it was before the clamp (which hides most mistakes, with random weights), and all the latents."""
    stepped, decoded = [], []

    def recorded(step: Callable) -> Callable:
        @functools.wraps(step)  # the reference looks at its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            stepped.append(step(*args, **kwargs))
            return stepped[-1]

        return call

    for name in step_names(pipe.scheduler):
        setattr(pipe.scheduler, name, recorded(getattr(pipe.scheduler, name)))
    for vae in parts_of(pipe, VAES).values():
        vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(out))

    def forget_texts(*args: Any) -> None:
        """They are read by then. Weights are mapped from their files, and take memory as they are used."""
        for encoder in parts_of(pipe, TEXT_ENCODERS).values():
            encoder.to("meta")

    pipe.unet.register_forward_pre_hook(forget_texts)
    drawn = torch.as_tensor(pipe(**call_arguments(pipe, inputs)).images)
    result = {f"{len(stepped)} steps": [out[0] for out in stepped]} | ({"decoded": decoded} if decoded else {})
    if hasattr(pipe.scheduler, "step_pred"):
        # Score SDE begins at 1348, and with random weights ends there: of such numbers float32 has no 1e-4. So the mean
        # that the picture is cut out of is compared, and what else was done to the picture, which is nothing
        mean = stepped[-1][1]
        return result | {"mean": mean, "cut to [0, 1], plus 1": drawn - mean.clamp(0, 1).permute(0, 2, 3, 1).cpu() + 1}
    return result | {"in [0, 1]": drawn}


class Stage(NamedTuple):
    """`load` takes a side; `run` takes what it loaded, the reference's or minidiff's, and returns named numbers."""

    name: str
    kind: str  # of verify's bounds
    load: Callable[[Side], Any]
    run: Callable[[Any], dict[str, Any]]


SCHEDULERS = r"(?!KarrasVe|RePaint).*Scheduler"  # those two step from more than a prediction
# A component's class, the kind of its numbers, and what runs on it; in the order of the data's way through a pipeline
STAGES = (
    (r"(CLIP|Bert)Tokenizer(Fast)?", "ids", tokenize),
    (r"CLIPTextModel(WithProjection)?|LDMBertModel", "states", encode_text),
    (r"UNet2D(Condition)?Model", "unet", predict),
    (r"ControlNetModel", "unet", steer),
    (SCHEDULERS, "ids", plan),
    (SCHEDULERS, "scheduler", step_through),
    (r"AutoencoderKL|VQModel", "vae", encode_and_decode),
    (r"CLIP(FeatureExtractor|ImageProcessor(Pil)?)", "states", read_pictures),
    (r"StableDiffusionSafetyChecker", "states", look),
)


def make_stages(index: dict[str, Any], inputs: Inputs) -> Iterator[Stage | str]:
    """The stages for a folder with this `model_index.json`; a line in place of what can't be compared."""
    parts = {name: spec[1] for name, spec in index.items() if isinstance(spec, list) and spec[1] is not None}
    missing = [name for name, cls in parts.items() if our_class(cls) is None]
    without = set(parts)
    for pattern, kind, run in STAGES:
        for name in parts:
            if name not in missing and re.fullmatch(pattern, parts[name]):
                without.discard(name)
                load = functools.partial(Side.component, name=name)
                yield Stage(name, kind, load, functools.partial(run, inputs=inputs))
    left_out = {name: f"minidiff has no {parts[name]}" for name in missing}
    left_out |= {name: f"there is no stage for a {parts[name]}" for name in without - left_out.keys()}

    own = index.get("_class_name", "")
    for name in SAME_PARTS if own in SAME_PARTS else (own,):
        if missing or our_class(name) is None:
            left_out["picture"] = f"minidiff has no {name} of these components"
        elif name in REFERENCE_FAILS.get(inputs.dtype, ()):
            left_out[name] = f"the reference's can't draw in {str(inputs.dtype).removeprefix('torch.')}"
        else:
            load = functools.partial(Side.pipeline, class_name=None if name == own else name)
            steps = max(inputs.steps, 4) if name == "PNDMPipeline" else inputs.steps  # PRK's first steps are three
            yield Stage(name, "picture", load, functools.partial(draw, inputs=inputs._replace(steps=steps)))
    for name, why in left_out.items():
        yield f"{name:<{WIDTH}}left out: {why}"
