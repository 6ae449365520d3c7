"""What the command line does once its flags are known: load, draw, and write the picture."""

import argparse
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minidiff

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
FIRST_ALONE = ("image", "control_image", "strength", "height", "width")  # not for the refiner

Pipeline = minidiff.DiffusionPipeline


def load(args: argparse.Namespace, device: str) -> tuple[Pipeline, Pipeline | None]:
    """The pipeline that does what is asked for, and the refiner."""
    dtype = getattr(torch, args.dtype or ("float16" if device.startswith("cuda") else "float32"))
    options = {"torch_dtype": dtype, "variant": args.variant}
    without = {"safety_checker": None} if args.safety is False else {}
    if in_one_file(args.folder):
        pipe, refiner = Pipeline.from_single_file(args.folder, torch_dtype=dtype, **without), None
    else:
        pipe, refiner = Pipeline.from_pretrained(args.folder, **options, **without), None
    if args.safety and pipe.components.get("safety_checker") is None:
        raise ValueError(f"--safety: {args.model} has no safety checker")
    if "prompt" not in takes(pipe):
        raise ValueError(f"{args.model}: a {type(pipe).__name__} takes no prompt; call it from Python")
    load_adapters(pipe, args.lora, args.embedding)
    if args.control:
        nets = [load_net(place, dtype) for place in args.control]
        kind = "Inpainting" if "mask_image" in takes(pipe) else "Text2Image"
        steered = getattr(minidiff, f"AutoPipelineFor{kind}")
        pipe = steered.from_pipe(pipe, controlnet=nets if len(nets) > 1 else nets[0])
    pipe = suited(pipe, args)
    if args.refiner and "denoising_end" not in takes(pipe):
        raise ValueError(f"--refiner: ends what XL began, but {args.model} has a {type(pipe).__name__}")
    if args.refiner:
        shared = {name: getattr(pipe, name) for name in ("vae", "text_encoder_2", "tokenizer_2")}
        refiner = minidiff.AutoPipelineForImage2Image.from_pretrained(args.refiner, **options, **shared)
    for one in (pipe, refiner) if refiner else (pipe,):
        if args.sampler or args.karras:
            name, keys = args.sampler or (type(one.scheduler).__name__, {})
            keys = keys | ({"use_karras_sigmas": True} if args.karras else {})
            one.scheduler = getattr(minidiff, name).from_config(one.scheduler.config, **keys)
        one.to(device)
    return pipe, refiner


def load_adapters(pipe: Pipeline, loras: list[str], embeddings: list[str]) -> None:
    """`loras` are files or Hub ids, each perhaps with `:` and a scale behind it."""
    if (loras or embeddings) and not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"--lora and --embedding are Stable Diffusion's, and this is a {type(pipe).__name__}")
    weights = {}
    for i, lora in enumerate(loras):
        file, _, scale = lora.rpartition(":")
        number = re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", scale) if file else None
        weights[f"lora{i}"] = float(scale) if number else 1.0
        pipe.load_lora_weights(file if number else lora, adapter_name=f"lora{i}")
    if loras:
        pipe.set_adapters([*weights], [*weights.values()])
    for file in embeddings:
        pipe.load_textual_inversion(file)


def load_net(place: str, dtype: torch.dtype) -> minidiff.ControlNetModel:
    net = minidiff.ControlNetModel
    return (net.from_single_file if in_one_file(place) else net.from_pretrained)(place, torch_dtype=dtype)


def in_one_file(place: str | Path) -> bool:
    """Or at a file's address; else it is a folder or a Hub id."""
    return Path(place).is_file() or "://" in str(place)


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
    asked |= {flag: load_image(asked[flag]) for flag in ("image", "mask") if asked[flag]}
    if args.control:  # it is the one picture of text to image
        pictures = [load_image(file) for file in args.control_image]
        name = "control_image" if "control_image" in takes(pipe) else "image"
        asked |= {"control_image": None, name: pictures if len(pictures) > 1 else pictures[0]}
    if args.preview:
        asked["preview"] = previewer(args, pipe)
    sized = args.bundled or args.height is not None or args.width is not None
    if args.image and "height" not in takes(pipe) and sized:  # it draws as large as its picture is
        height, width = pipe.size(args.height, args.width)
        asked |= {"image": asked["image"].resize((width, height)), "height": None, "width": None}
    for flag, keyword in KEYWORDS.items():
        if asked[flag] is not None and keyword not in takes(pipe):
            raise ValueError(f"--{flag}: a {type(pipe).__name__} takes no {keyword}")
        if asked[flag] is None and flag in ("image", "mask") and keyword in takes(pipe):
            raise ValueError(f"{args.model}: a {type(pipe).__name__} takes a picture: give --{flag}")
    call = {KEYWORDS[flag]: value for flag, value in asked.items() if value is not None}
    seeded = [torch.Generator().manual_seed(args.seed + i) for i in range(args.n)]
    return {"prompt": args.prompt, "generator": seeded, **call}


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
        vae = minidiff.AutoencoderTiny.from_pretrained(args.preview, torch_dtype=pipe.dtype).to(pipe.device)
    if vae.config.latent_channels != channels:
        raise ValueError(f"--preview: {args.preview} has {vae.config.latent_channels} latent channels, not {channels}")

    def on_step(run: Pipeline, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        latents = tensors["latents"]
        latents = latents / latents.std().clamp(min=1)  # a VAE knows none as wide as the first noise of Euler's
        write(lay_out(pt_to_pil(decode_latents(vae, latents, vae.device, run.latents_as)), args), preview_file(args))

    return on_step


def lay_out(pictures: list[Image.Image], args: argparse.Namespace) -> Image.Image:
    """In a grid, enlarged."""
    grid = make_grid(pictures)
    size = (grid.width * args.scale, grid.height * args.scale)
    return grid.resize(size, resample=Image.Resampling.NEAREST)  # pixels stay sharp


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
