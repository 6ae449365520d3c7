"""What the command line does once its flags are known: load, draw, and write the picture."""

import argparse
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minidiff

from .checks import naming
from .images import load_image, make_grid, pt_to_pil
from .pipelines.latents import decode_latents

BASE_SHARE = 0.8  # of the noise that XL's base model takes away; its refiner was trained on the rest
KEYWORDS = {  # flags, and what they are in a pipeline's call
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "image": "image",
    "mask": "mask_image",
    "control_image": "control_image",
    "strength": "strength",
    "height": "height",
    "width": "width",
    "n": "num_images_per_prompt",
    "preview": "callback_on_step_end",
}
RECORDED = ("prompt", "negative", "image", "mask", "strength", "height", "width", "control", "control_image")
RECORDED += ("model", "lora", "embedding", "refiner", "scheduler", "steps", "guidance", "seed", "n")  # in the PNG
ERRORS = (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, MemoryError)  # told in a line
FIRST_ALONE = ("image", "control_image", "strength", "height", "width")  # not for the refiner

Pipeline = minidiff.DiffusionPipeline


def load(args: argparse.Namespace) -> tuple[Pipeline, Pipeline | None]:
    """The pipeline that does what is asked for, and the refiner."""
    without = {"safety_checker": None} if args.safety is False else {}
    with naming("--model"):
        pipe, refiner = load_one(Pipeline, args.folder, args, **without), None
        if "prompt" not in takes(pipe):
            raise ValueError(f"{args.model}: a {type(pipe).__name__} takes no prompt; call it from Python")
    if args.safety and pipe.components.get("safety_checker") is None:
        raise ValueError(f"--safety: {args.model} has no safety checker")
    load_adapters(pipe, args.lora, args.embedding)
    if args.control:
        with naming("--control"):
            nets = [load_part(minidiff.ControlNetModel, place, args) for place in args.control]
            kind = "Inpainting" if "mask_image" in takes(pipe) else "Text2Image"
            steered = getattr(minidiff, f"AutoPipelineFor{kind}")
            pipe = steered.from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0])
    pipe = suited(pipe, args)
    if args.refiner and "denoising_end" not in takes(pipe):
        raise ValueError(f"--refiner: ends what XL began, but {args.model} has a {type(pipe).__name__}")
    if args.refiner:
        shared = {name: getattr(pipe, name) for name in ("vae", "text_encoder_2", "tokenizer_2")}
        with naming("--refiner"):
            refiner = load_one(Pipeline, args.refiner, args, **shared)
            refiner = minidiff.AutoPipelineForImage2Image.from_pipe(refiner)
    for one in (pipe, refiner) if refiner else (pipe,):
        if args.sampler or args.karras:
            name, keys = args.sampler or (type(one.scheduler).__name__, {})
            keys = keys | ({"use_karras_sigmas": True} if args.karras else {})
            with naming("--karras" if args.karras else "--scheduler"):
                one.scheduler = getattr(minidiff, name).from_config(one.scheduler.config, **keys)
        with naming("--device"):
            one.to(args.device)
        if args.optimize:
            one.optimize()
    return pipe, refiner


def load_one(kind: Any, place: str | Path, args: argparse.Namespace, **parts: Any) -> Any:
    """A pipeline or a network, of a file, which may be at an address, or of a folder or a Hub id."""
    dtype = getattr(torch, args.dtype)
    if (Path(place).is_file() or "://" in str(place)) and hasattr(kind, "from_single_file"):
        return kind.from_single_file(place, torch_dtype=dtype, **parts)
    return kind.from_pretrained(place, torch_dtype=dtype, variant=args.variant, **parts)


def load_part(kind: Any, place: str, args: argparse.Namespace) -> Any:
    """A network beside the pipeline, which may lack the variant, as one of the pipeline may."""
    try:
        return load_one(kind, place, args)
    except OSError as error:
        if args.variant is None:
            raise
        part = load_one(kind, place, argparse.Namespace(dtype=args.dtype, variant=None))
        warnings.warn(f"{error}; its other weights are loaded", stacklevel=2)
        return part


def load_adapters(pipe: Pipeline, loras: list[str], embeddings: list[str]) -> None:
    if (loras or embeddings) and not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"--lora and --embedding are Stable Diffusion's, and this is a {type(pipe).__name__}")
    weights = {}
    with naming("--lora"):
        for i, (place, scale) in enumerate(map(scaled, loras)):
            weights[f"lora{i}"] = scale
            pipe.load_lora_weights(place, adapter_name=f"lora{i}")
        if loras:
            pipe.set_adapters([*weights], [*weights.values()])
    with naming("--embedding"):
        for file in embeddings:
            pipe.load_textual_inversion(file)


def scaled(lora: str) -> tuple[str, float]:
    """A file or Hub id, and the scale that may stand behind it after a `:`."""
    found = re.fullmatch(r"(.+):([-+]?[0-9]*\.?[0-9]+)", lora)
    return (found[1], float(found[2])) if found else (lora, 1.0)


def suited(pipe: Pipeline, args: argparse.Namespace) -> Pipeline:
    """The pipeline, or one of the same parts that takes the pictures which are given."""
    if args.mask and "mask_image" not in takes(pipe):
        return minidiff.AutoPipelineForInpainting.from_pipe(pipe)
    if args.image and ("control_image" if args.control else "image") not in takes(pipe):
        return minidiff.AutoPipelineForImage2Image.from_pipe(pipe)
    return pipe


def takes(pipe: Pipeline) -> Mapping[str, inspect.Parameter]:
    """The parameters of its call."""
    return inspect.signature(type(pipe).__call__).parameters


def arguments_of(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Any]:
    """A call's. Where steps and guidance aren't given, `args` has the pipeline's defaults afterwards.

    Raises ValueError for a flag that the pipeline doesn't take, and for a picture that it needs.
    """
    for flag in ("steps", "guidance"):
        if vars(args)[flag] is None:
            setattr(args, flag, takes(pipe)[KEYWORDS[flag]].default)
    asked = {flag: vars(args)[flag] for flag in KEYWORDS} | {"n": args.n if args.n > 1 else None}
    steering = "control_image" if "control_image" in takes(pipe) else "image"  # text to image has this one alone
    if args.control:
        asked |= {"control_image": None, steering: args.control_image}
    known = {*takes(pipe), *(("height", "width") if args.image else ())}  # else it is made as large
    for flag, keyword in KEYWORDS.items():
        if asked[flag] is not None and keyword not in known:
            raise ValueError(f"{as_flag(flag)}: a {type(pipe).__name__} takes no {keyword}")
        if asked[flag] is None and flag in ("image", "mask") and keyword in known:
            raise ValueError(f"{args.model}: a {type(pipe).__name__} takes a picture: give --{flag}")
    asked |= pictures_of(args, pipe, steering)
    if args.preview:
        asked["preview"] = previewer(args, pipe)
    call = {KEYWORDS[flag]: value for flag, value in asked.items() if value is not None}
    seeded = [torch.Generator().manual_seed(args.seed + i) for i in range(args.n)]
    return {"prompt": args.prompt, "generator": seeded, **call}


def pictures_of(args: argparse.Namespace, pipe: Pipeline, steering: str) -> dict[str, Any]:
    """What `arguments_of` asks of pictures: those that the flags name, and their height and width."""
    read, files = {}, {"image": [args.image], "mask": [args.mask], "control_image": args.control_image or []}
    for flag in files:
        with naming(as_flag(flag)):
            read[flag] = [load_image(file) for file in files[flag] if file]
    asked = {flag: some if len(some) > 1 else some[0] for flag, some in read.items() if some}
    controls = zip(files["control_image"], read["control_image"], strict=True)
    if len({one.size for one in read["control_image"]}) > 1 and None in (args.height, args.width):
        sizes = ", ".join(f"{file} is {one.width} x {one.height}" for file, one in controls)
        raise ValueError(f"--control-image: {sizes}: make them of one size, or give --height and --width")
    height, width = sides(args, pipe, *(read["image"] or read["control_image"])[:1])
    if args.control:
        asked[steering] = asked.pop("control_image")
    if not args.image or "height" in takes(pipe):
        return asked | {"height": height, "width": width}
    if args.bundled or args.height or args.width:
        height, width = pipe.size(height, width)
        asked["image"] = asked["image"].resize((width, height))
    return asked | {"height": None, "width": None}  # the pipeline draws as large as its picture is


def sides(args: argparse.Namespace, pipe: Pipeline, picture: Image.Image | None = None) -> tuple[int | None, ...]:
    """Height and width: where they aren't asked for, those that keep the shape of the `picture`, if there is one. (The
    bundled model draws in its own size.)"""
    asked = args.height, args.width
    if picture is None or args.bundled:
        return asked
    own, factor = (picture.height, picture.width), pipe.vae_scale_factor
    grown = (args.height or own[0]) / own[0] * (args.width or own[1]) / own[1]  # read where one at most is asked for
    whole = round if any(asked) else int  # as pipelines do with a picture's own
    nearest = (max(factor, whole(side * grown / factor) * factor) for side in own)
    return tuple(side or near for side, near in zip(asked, nearest, strict=True))


def as_flag(name: str) -> str:
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def in_flags(error: Exception) -> str:
    """What an error says, with the flag in place of the argument that it begins with."""
    for flag, keyword in KEYWORDS.items():
        if str(error).startswith(f"{keyword}="):
            return as_flag(flag) + str(error).removeprefix(keyword)
    return str(error) or "there is not enough memory"


def draw(pipe: Pipeline, refiner: Pipeline | None, call: dict[str, Any]) -> list[Image.Image]:
    if refiner is None:
        return pipe(**call).images
    latents = pipe(**call, denoising_end=BASE_SHARE, output_type="latent").images
    again = {name: value for name, value in call.items() if name not in FIRST_ALONE}
    return refiner(image=latents, denoising_start=BASE_SHARE, **again).images


def preview_file(args: argparse.Namespace) -> Path:
    return args.output.with_suffix(".preview.png")


def previewer(args: argparse.Namespace, pipe: Pipeline) -> Callable[..., None]:
    """A `callback_on_step_end` that writes what the latents show. Raises ValueError for a VAE of other latents."""
    vae, channels = pipe.vae, pipe.vae.config.latent_channels
    if args.preview != "own":
        with naming("--preview"):
            vae = load_part(minidiff.AutoencoderTiny, args.preview, args).to(pipe.device)
    if vae.config.latent_channels != channels:
        raise ValueError(f"--preview: {args.preview} has {vae.config.latent_channels} latent channels, not {channels}")

    def on_step(run: Pipeline, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        latents = tensors["latents"]
        latents = latents / latents.std().clamp(min=1)  # a VAE knows none as wide as the first noise of Euler's
        pictures = pt_to_pil(decode_latents(vae, latents, vae.device, run.latents_as))
        write(make_grid(pictures, args.scale), preview_file(args))

    return on_step


def write(picture: Image.Image, file: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with the `settings` that drew it. Raises OSError, which names the file."""
    chunks = PngInfo()
    for key in RECORDED if settings else ():
        if settings[key] not in (None, []):
            chunks.add_itxt(key, str(settings[key]))
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        picture.save(unfinished, format="png", pnginfo=chunks)
        unfinished.replace(file.resolve())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{file} can't be written: {error}") from None
