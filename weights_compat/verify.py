"""The reference and minidiff on the same folder, side by side, stage by stage: is each number the reference's number?

Both have the same public surface, so each stage is one function that runs on the object of either. A stage loads the
reference's component, runs it, drops it, and does the same with minidiff's: memory holds one side at a time.
"""

import argparse
import functools
import gc
import importlib
import inspect
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .manifests import narrow, read_manifest, steered, steered_name
from .random_folder import make_random_folder

# The largest |difference| that passes, relative to the reference's largest value. In half precision both sides round
# at every operation, in whatever order their kernels take them, and guidance carries that through all steps: a bound
# there, five units in the last place, tells of overflow and gross mistakes. Two layers swapped in the middle of a UNet
# can hide below it, and stand out a hundredfold in float32
BOUNDS = {
    "float32": {"ids": 0, "scheduler": 1e-6, "states": 2e-5, "unet": 2e-5, "vae": 2e-5, "picture": 1e-4},
    "float16": {"ids": 0, "scheduler": 5e-3, "states": 5e-3, "unet": 5e-3, "vae": 5e-3, "picture": 5e-2},
    "bfloat16": {"ids": 0, "scheduler": 4e-2, "states": 4e-2, "unet": 4e-2, "vae": 4e-2, "picture": 2e-1},
}

TEXTS = [
    "a photograph of an astronaut riding a horse",
    "",
    "  two  spaces,\ttabs\nand\r\nlines \u00a0\u3000 ",
    "Crème brûlée à la São Tomé; e\u0301 a\u030a \ufb01 ß İ ŉ",
    "it's we're I'll they've don't I'M you'D o'clock ''s",
    "in 1984: 3,141.59 \u00d7 10⁻³ ½ Ⅷ ٣٤",
    "一只猫坐在垫子上。東京タワー 서울 กรุงเทพ हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ 🇨🇭 ☃",
    "\x00\x01\x07control\x1b[0m \u200b\u200d\u202e\ufeff\x7f\x85",
    "<|startoftext|>inside<|endoftext|> and <|ENDOFTEXT|> and !!! !",
    "antidisestablishmentarianism-pneumonoultramicroscopicsilicovolcanoconiosis",
    "(masterpiece:1.3), [blurry], {a|b}, <lora:x:0.7>, https://example.org/?q=1&r=2#top",
    "\U0001d54b\U0001d559\U0001d556 ꙮ \U00010348 \ue000 \ufffd",
    "a" * 400,
    "a red apple, " * 250,
]

ORDER = (
    "tokenizer",
    "text_encoder",
    "unet",
    "controlnet",
    "scheduler",
    "vae",
    "feature_extractor",
    "safety_checker",
)  # the way of the data
REFERENCE_MODULES = {"stable_diffusion": "diffusers.pipelines.stable_diffusion.safety_checker"}
PICTURE_READERS = dict.fromkeys(("CLIPFeatureExtractor", "CLIPImageProcessor"), "CLIPImageProcessorPil")
UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
PICTURES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
)
RANDOM = Path()  # --controlnet without a folder
# PRK steps turn float16 into float32, which the network then refuses; NumPy has no bfloat16 for the picture
REFERENCE_FAILS = {torch.float16: ("PNDMPipeline",), torch.bfloat16: UNCONDITIONAL}


class Result(NamedTuple):
    stage: str
    bound: float
    difference: float = float("nan")  # max over all elements
    relative: float = float("nan")  # to the reference's largest value
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and self.relative <= self.bound

    def __str__(self) -> str:
        numbers = f"{self.difference:>12.3g}{self.relative:>12.3g}{self.bound:>10.0e}"
        end = "" if self.error is None else f"  {self.error}"
        return f"{self.stage:<44}{numbers}  {'PASS' if self.passed else 'FAIL'}{end}"


class Side(NamedTuple):
    """Loads from the folder, with the reference or with minidiff."""

    reference: bool
    folder: Path
    index: dict[str, Any]
    device: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "the reference" if self.reference else "minidiff"

    def component(self, name: str) -> Any:
        library, class_name = self.index[name]
        library = REFERENCE_MODULES.get(library, library)
        class_name = PICTURE_READERS.get(class_name, class_name)
        if not self.reference:
            class_name = class_name.removesuffix("Pil")
        cls = getattr(importlib.import_module(library if self.reference else "minidiff"), class_name)
        if not hasattr(cls, "forward"):
            return cls.from_pretrained(str(self.folder), subfolder=name)
        dtype = {"dtype" if self.reference and library == "transformers" else "torch_dtype": self.dtype}
        return cls.from_pretrained(str(self.folder), subfolder=name, **dtype).to(self.device)

    def text_encoder(self, name: str) -> tuple[Any, Any]:
        """With the reference's tokenizer on both sides: a wrong id is the tokenizer's fault, not this one's."""
        tokenizer = self._replace(reference=True).component(name.replace("text_encoder", "tokenizer"))
        return tokenizer, self.component(name)

    def pipeline(self, class_name: str | None = None) -> Any:
        """The folder's pipeline, or its components under the class `class_name`."""
        library = importlib.import_module("diffusers" if self.reference else "minidiff")
        left_out = {name: None for name in ("safety_checker", "feature_extractor") if name in self.index}
        if left_out:
            left_out["requires_safety_checker"] = False
        pipe = library.DiffusionPipeline.from_pretrained(str(self.folder), torch_dtype=self.dtype, **left_out)
        if class_name is not None:
            pipe = getattr(library, class_name)(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)


class Stage(NamedTuple):
    """`load` takes a side; `run` takes what it loaded, the reference's or minidiff's, and returns named numbers."""

    name: str
    kind: str  # of BOUNDS
    load: Callable[[Side], Any]
    run: Callable[[Any], dict[str, Any]]


class Inputs(NamedTuple):
    """Random inputs that are the same for both sides."""

    device: str
    dtype: torch.dtype
    steps: int
    seed: int

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=self.generator(seed)).to(self.device, self.dtype)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + seed)


# What runs in each stage, on an object of the reference's or of minidiff's


def tokenize(tokenizer: Any) -> dict[str, Any]:
    cut = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"whole": [torch.tensor(ids) for ids in tokenizer(TEXTS).input_ids], "cut and padded": cut}


def encode_text(tokenizer_and_encoder: tuple[Any, Any]) -> dict[str, Any]:
    tokenizer, encoder = tokenizer_and_encoder
    texts = [TEXTS[0], TEXTS[1], TEXTS[-1]]  # of usual length, empty, too long
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    out = encoder(ids.to(encoder.device), output_hidden_states=True)
    layers = out.hidden_states[:-1]  # the last one is the next line's, before the norm
    result = {"each layer": layers, "states": out.last_hidden_state}
    return result | ({"projected": out.text_embeds} if hasattr(out, "text_embeds") else {"pooled": out.pooler_output})


def denoise(unet: Any, inputs: Inputs) -> dict[str, Any]:
    c = unet.config
    sample = inputs.randn(2, c.in_channels, *_pair(c.sample_size or 64))
    t = torch.tensor([981, 1], device=inputs.device)
    if "cross_attention_dim" not in c:
        return {"": unet(sample, t).sample}
    return {"": unet(sample, t, **read(c, inputs)).sample}


def steer(net: Any, inputs: Inputs) -> dict[str, Any]:
    """A ControlNet's residuals, in both of its modes."""
    sample, t = inputs.randn(2, net.config.in_channels, 24, 16), torch.tensor([981, 1], device=inputs.device)
    control = inputs.randn(2, net.config.conditioning_channels, 192, 128, seed=3)
    result = {}
    for guess_mode in (False, True):
        options = {"guess_mode": guess_mode, "conditioning_scale": 0.8, "return_dict": False}
        down, mid = net(sample, t, controlnet_cond=control, **read(net.config, inputs), **options)
        result["guess mode" if guess_mode else "residuals"] = [*down, mid]
    return result


def read(c: Any, inputs: Inputs) -> dict[str, Any]:
    """What a network of this config reads beside the latents."""
    added = None
    if c.addition_embed_type == "text_time":  # XL: pooled text; original size, crop, target size
        pooled = inputs.randn(2, c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim, seed=1)
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [768, 512, 64, 32, 1024, 896]], device=inputs.device)
        added = {"text_embeds": pooled, "time_ids": sizes}
    states = inputs.randn(2, 77, c.cross_attention_dim, seed=2)
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def plan(scheduler: Any, inputs: Inputs) -> dict[str, Any]:
    scheduler.set_timesteps(inputs.steps)
    return {"timesteps": scheduler.timesteps}


def step_through(scheduler: Any, inputs: Inputs) -> dict[str, Any]:
    """A whole trajectory; the same predictions, and the same noise where the scheduler draws any, for both sides."""
    scheduler.set_timesteps(inputs.steps)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": inputs.generator()} if draws else {}
    samples = [inputs.randn(2, 4, 16, 16)]
    for i, t in enumerate(scheduler.timesteps, 1):
        eps = inputs.randn(2, 4, 16, 16, seed=i)
        samples.append(scheduler.step(eps, t, samples[-1], **options).prev_sample)
    return {f"{len(samples) - 1} steps": samples}


def encode_and_decode(vae: Any, inputs: Inputs) -> dict[str, Any]:
    c = vae.config
    size = _pair(c.sample_size)
    factor = 2 ** (len(c.block_out_channels) - 1)
    dist = vae.encode(inputs.randn(1, c.in_channels, *size).clamp(-1, 1)).latent_dist
    latents = inputs.randn(1, c.latent_channels, *(n // factor for n in size), seed=1)
    return {
        "encode, mean": dist.mean,
        "encode, log variance": dist.logvar,
        "encode, sampled": dist.sample(inputs.generator()),
        "decode": vae.decode(latents).sample,
    }


def read_pictures(processor: Any) -> dict[str, Any]:
    pictures = [picture(300, 200), picture(150, 224), picture(64, 512)]
    return {"pixels": torch.as_tensor(processor(pictures, return_tensors="pt")["pixel_values"])}


def look(checker: Any, inputs: Inputs) -> dict[str, Any]:
    """What it sees in two pictures, and its flags."""
    seen = inputs.randn(2, 3, 224, 224)
    tower = checker.vision if hasattr(checker, "vision") else checker.vision_model
    flags = checker(clip_input=seen, images=torch.ones(2, 3, 8, 8))[1]
    return {"embeddings": checker.visual_projection(tower(seen)[1]), "flags": torch.tensor(flags)}


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(pipe: Any, inputs: Inputs) -> dict[str, Any]:
    """A picture, what it was before the clamp (which hides most mistakes, with random weights), and all the latents."""
    samples, decoded = [], []
    step = pipe.scheduler.step

    @functools.wraps(step)  # the reference looks at its signature
    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        samples.append(out[0])
        return out

    pipe.scheduler.step = recorded
    options: dict[str, Any] = {}
    if hasattr(pipe, "vae"):
        options = {"prompt": TEXTS[0], "negative_prompt": "blurry"}
        parameters = inspect.signature(pipe.__call__).parameters
        side = (
            32 if "Upscale" in type(pipe).__name__ else pipe.vae_scale_factor * _pair(pipe.unet.config.sample_size)[0]
        )
        if "image" in parameters:
            options |= {"image": picture(side, side)}
        if "control_image" in parameters:
            options |= {"control_image": picture(side, side)}
        if "mask_image" in parameters:
            mask = np.zeros((side, side), np.uint8)
            mask[side // 4 : side // 2] = 255
            options |= {"mask_image": Image.fromarray(mask)}
        pipe.vae.decoder.register_forward_hook(lambda module, args, out: decoded.append(out))
    options |= {"num_inference_steps": inputs.steps, "generator": inputs.generator(), "output_type": "np"}
    drawn = pipe(**options).images
    result = {f"{len(samples)} steps": samples}
    if decoded:
        result["decoded"] = decoded
    return result | {"in [0, 1]": drawn}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def make_stages(index: dict[str, Any], inputs: Inputs) -> Iterator[Stage | str]:
    """The stages for a folder with this `model_index.json`; a line in place of what minidiff doesn't have yet."""
    import minidiff

    parts = {name: spec[1] for name, spec in index.items() if isinstance(spec, list) and spec[1] is not None}
    missing = {
        name: cls
        for name, cls in parts.items()
        if not hasattr(minidiff, PICTURE_READERS.get(cls, cls).removesuffix("Pil"))
    }
    present = [name for kind in ORDER for name in parts if name.removesuffix("_2") == kind and name not in missing]
    runs = {"unet": denoise, "vae": encode_and_decode, "controlnet": steer}
    for name in present:
        load = functools.partial(Side.component, name=name)
        if name.startswith("tokenizer"):
            yield Stage(name, "ids", load, tokenize)
        elif name.startswith("text_encoder"):
            yield Stage(name, "states", functools.partial(Side.text_encoder, name=name), encode_text)
        elif name == "feature_extractor":
            yield Stage(name, "states", load, read_pictures)
        elif name == "safety_checker":
            yield Stage(name, "states", load, functools.partial(look, inputs=inputs))
        elif name == "scheduler":
            yield Stage(name, "ids", load, functools.partial(plan, inputs=inputs))
            yield Stage(name, "scheduler", load, functools.partial(step_through, inputs=inputs))
        else:
            kind = "unet" if name == "controlnet" else name
            yield Stage(name, kind, load, functools.partial(runs[name], inputs=inputs))

    for name in parts.keys() - missing.keys() - set(present):
        yield f"{name:<44}left out: there is no stage for a {parts[name]}"
    name = index.get("_class_name")
    if "scheduler" in present and name in UNCONDITIONAL:
        for name in UNCONDITIONAL:
            if name in REFERENCE_FAILS.get(inputs.dtype, ()):
                yield f"{name:<44}left out: the reference's can't draw in {str(inputs.dtype).removeprefix('torch.')}"
                continue
            load = functools.partial(Side.pipeline, class_name=name)
            steps = max(inputs.steps, 4) if name == "PNDMPipeline" else inputs.steps  # PRK's first steps are three
            yield Stage(name, "picture", load, functools.partial(draw, inputs=inputs._replace(steps=steps)))
    elif "scheduler" in present and name in PICTURES:
        yield Stage(name, "picture", Side.pipeline, functools.partial(draw, inputs=inputs))
    else:
        missing["picture"] = name
    for name, cls in missing.items():
        yield f"{name:<44}left out: minidiff has no {cls} yet"


def verify(folder: Path, index: dict[str, Any], inputs: Inputs) -> Iterator[Result | str]:
    """Yields a result for each number compared, and a line for each thing that is left out."""
    bounds = BOUNDS[str(inputs.dtype).removeprefix("torch.")]
    for stage in make_stages(index, inputs):
        if isinstance(stage, str):
            yield stage
            continue
        outputs = []
        for reference in (True, False):
            side = Side(reference, folder, index, inputs.device, inputs.dtype)
            try:
                with torch.no_grad():
                    outputs.append(_on_cpu(stage.run(stage.load(side))))
            except Exception as error:  # whatever breaks is this stage's finding; the other stages are still wanted
                yield Result(stage.name, bounds[stage.kind], error=f"{side.name}: {type(error).__name__}: {error}")
                break
            gc.collect()  # before the other side is loaded
            if inputs.device.startswith("cuda"):
                torch.cuda.empty_cache()
        else:
            expected, actual = outputs
            for label, tensors in expected.items():
                name = f"{stage.name}: {label}".removesuffix(": ")
                yield compare(name, bounds[stage.kind], tensors, actual[label])


def _on_cpu(outputs: dict[str, Any]) -> dict[str, list[Tensor]]:
    lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in outputs.items()}
    return {name: [torch.as_tensor(value).detach().float().cpu() for value in values] for name, values in lists.items()}


def compare(stage: str, bound: float, expected: list[Tensor], actual: list[Tensor]) -> Result:
    """The worst of several pairs, each relative to the largest value of the reference's tensor."""
    if [x.shape for x in expected] != [x.shape for x in actual]:
        shapes = [", ".join(str(tuple(x.shape)) for x in tensors) for tensors in (expected, actual)]
        return Result(stage, bound, error=f"shapes differ: the reference has {shapes[0]}; minidiff {shapes[1]}")
    for name, tensors in (("the reference", expected), ("minidiff", actual)):
        if not all(x.isfinite().all() for x in tensors):
            return Result(stage, bound, error=f"{name}: not finite")
    worst = Result(stage, bound, 0.0, 0.0)
    for x, y in zip(expected, actual, strict=True):
        difference, largest = (x - y).abs().max().item(), x.abs().max().item()
        relative = difference / largest if largest else float("inf") if difference else 0.0
        worst = max(worst, Result(stage, bound, difference, relative), key=lambda result: result.relative)
    return worst


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m weights_compat.verify",
        description="Loads one folder with the reference (diffusers, transformers) and with minidiff, and compares them"
        " stage by stage. Exit code: 0 if every stage passes, 1 if any fails, 2 for a bad command line.",
        epilog="The bounds of float16 and bfloat16 are looser because both sides round at each operation, and not in"
        " the same places. There a PASS rules out overflow and gross mistakes; in float32 it says that the"
        " numbers agree.",
    )
    parser.add_argument("name", metavar="NAME", help="a Hub id or a folder; with --random, a manifest's name")
    parser.add_argument("--random", action="store_true", help="make a folder with random weights from a manifest")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="with --random: the same structure, narrow (default)")
    size.add_argument("--full", action="store_true", help="with --random: at real size (SD 1.5 takes 5.5 GB of disk)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="with --random: make the folder here, and leave it")
    net = "with a ControlNet beside the UNet: a net's folder, or none with --random: random weights too"
    parser.add_argument("--controlnet", metavar="DIR", type=Path, nargs="?", const=RANDOM, help=net)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    parser.add_argument("--dtype", choices=BOUNDS, default="float32", help="of weights and inputs (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of denoising (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs (%(default)s)")
    args = parser.parse_args(arguments)
    if not args.random and (args.small or args.full or args.keep):
        parser.error("--small, --full and --keep go with --random")
    if args.controlnet is RANDOM and not args.random:
        parser.error("argument --controlnet: needs a net's folder, without --random")
    if args.keep and args.keep.exists():
        parser.error(f"argument --keep: {args.keep} exists")
    if args.steps < 1:
        parser.error(f"argument --steps: {args.steps} is less than 1")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {args.device} can't be used here: {str(error).splitlines()[0]}")
    try:
        args.manifest = read_manifest(args.name) if args.random else None
    except ValueError as error:
        parser.error(f"argument NAME: {error}")
    args.error = parser.error
    return args


def find_folder(name: str) -> Path:
    from minidiff.loading.folder import wanted_by_pipeline
    from minidiff.loading.hub import fetch
    from minidiff.loading.weights import Files

    return fetch(name, lambda names: wanted_by_pipeline(names, Files(), {}), "model_index.json")


def beside(folder: Path, net: Path, place: Path) -> Path:
    """Makes `place` a folder of both: links to what is in `folder`, with `net` as its ControlNet."""
    for file in folder.resolve().iterdir():
        (place / file.name).symlink_to(file)
    (place / "controlnet").symlink_to(net)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_class_name": steered_name(index["_class_name"]), "controlnet": ["diffusers", "ControlNetModel"]}
    (place / "model_index.json").unlink()
    (place / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return place


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    import minidiff
    from minidiff.loading.config import read_json

    for library in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        # TensorFloat-32 is no float32: cuDNN's convolutions take it unless told otherwise
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        try:
            if args.manifest:
                folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minidiff-")))
                size = "full size" if args.full else "small"
                made = f"{args.manifest.repository}, {size}, random weights, seed {args.seed}"
                manifest = args.manifest if args.full else narrow(args.manifest)
                make_random_folder(steered(manifest) if args.controlnet is RANDOM else manifest, folder, args.seed)
            else:
                folder, made = find_folder(args.name), args.name
            if args.controlnet not in (None, RANDOM):
                place = stack.enter_context(tempfile.TemporaryDirectory(prefix="minidiff-"))
                folder, made = beside(folder, args.controlnet.resolve(), Path(place)), f"{made}, with {args.controlnet}"
            index = read_json(folder / "model_index.json")
        except OSError as error:
            args.error(str(error))
        gc.freeze()  # the libraries stay; without this each gc.collect between two sides would walk through them
        stack.callback(gc.unfreeze)
        ours = f"minidiff {minidiff.__version__}"  # from the package itself: a plain clone isn't installed
        others = (f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch"))
        print(f"versions  {', '.join([ours, *others])}")
        print(f"folder    {folder} ({made})")
        print(f"run       {args.device}, {args.dtype}, {args.steps} steps\n")
        print(f"{'stage':<44}{'max |diff|':>12}{'relative':>12}{'bound':>10}")
        results = []
        for result in verify(folder, index, Inputs(args.device, getattr(torch, args.dtype), args.steps, args.seed)):
            print(result, flush=True)
            results += [result] if isinstance(result, Result) else []
    failed = [result.stage for result in results if not result.passed]
    print(f"\n{len(results) - len(failed)} of {len(results)} PASS" + (f"; FAIL: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
