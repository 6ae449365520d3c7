"""python -m minidiff "a red apple on a blue background": text to a picture file, from the command line."""

import argparse
import difflib
import gc
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

import minidiff
from minidiff.batch import draw_many
from minidiff.command import ERRORS, arguments_of, as_flag, draw, in_flags, load, preview_file, write
from minidiff.images import make_grid

BUNDLED = "tiny-emoji"
DPM = "DPMSolverMultistepScheduler"
SCHEDULERS: dict[str, tuple[str, dict]] = {  # the usual short names: a class, and keys of its config
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmsolver": (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (DPM, {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sde-dpmsolver++": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "singlestep": ("DPMSolverSinglestepScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class Parser(argparse.ArgumentParser):
    """Raises ValueError where it would end the program: what is wrong may be one line of many."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def number(kind: type, least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A flag's type: a finite number of this kind, in `least`..`most`."""

    def read(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and abs(value) < math.inf):
            limits = f"lie in {least}..{most}" if most < math.inf else f"be {least} or more"
            raise argparse.ArgumentTypeError(f"{text} must {'be finite' if least == -math.inf else limits}")
        return value

    read.__name__ = kind.__name__  # argparse's "invalid int value"
    return read


def flags() -> Parser:
    parser = Parser(prog="python -m minidiff", description="Draw what a prompt says.")
    parser.add_argument("prompt", nargs="?", help='such as "a red apple on a blue background"')
    parser.add_argument(
        "--model", help=f"a folder, a Hub id, or a .safetensors (default: {BUNDLED}, which comes with the package)"
    )
    parser.add_argument("--list", action="store_true", help=f"print what {BUNDLED} knows to draw, and stop")
    parser.add_argument(
        "--steps", type=number(int, 1), help="of denoising (20 if bundled, else the pipeline's default)"
    )
    parser.add_argument(
        "--guidance", type=number(float), help="how far to follow the prompt (3 if bundled, else as above)"
    )
    parser.add_argument("--negative", metavar="PROMPT", help="what the picture should not show")
    parser.add_argument("--image", metavar="FILE", help="a picture to begin with; a URL will do")
    parser.add_argument("--mask", metavar="FILE", help="of --image, draw anew what is white here")
    parser.add_argument(
        "--strength", type=number(float, 0, 1), help="how far to leave --image, 0 to 1 (default: the pipeline's)"
    )
    net = "a ControlNet's folder, Hub id or file; may be given again, with a picture for each"
    parser.add_argument("--control", metavar="MODEL", action="append", help=net)
    parser.add_argument("--control-image", metavar="FILE", action="append", help="what it follows: edges, a depth, ...")
    parser.add_argument("--refiner", metavar="MODEL", help="for XL: takes away the last fifth of the noise")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same picture (%(default)s)")
    parser.add_argument(
        "--height", type=number(int, 1), help="in pixels, a multiple of 8 (default: the model's, or in --image's shape)"
    )
    parser.add_argument("--width", type=number(int, 1), help="the same across")
    parser.add_argument(
        "-n", type=number(int, 1), default=1, metavar="N", help="pictures, laid out in a grid (%(default)s)"
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="default: the one that the model's folder names")
    parser.add_argument("--karras", action="store_true", help="space the noise levels as Karras et al. do")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: the best one here)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda")
    parser.add_argument("--optimize", action="store_true", default=None, help="quicker on a CPU, for more memory")
    parser.add_argument("--variant", help='of the weight files, such as "fp16"')
    checked = "with the model's safety checker, or without (default: with it, if there is one)"
    parser.add_argument("--safety", action=argparse.BooleanOptionalAction, help=checked)
    tiny = "a tiny VAE (madebyollin/taesd, for XL madebyollin/taesdxl), or own: the model's"
    shows = "shows each step in OUTPUT.preview.png, which no safety checker sees, and which goes in the end"
    parser.add_argument("--preview", metavar="MODEL", help=f"{tiny}; {shows}")
    parser.add_argument("--scale", type=number(int, 1, 64), help="enlarge each pixel (4 if bundled, else 1)")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="may be given several times"
    )
    parser.add_argument("--embedding", action="append", default=[], metavar="FILE", help="textual inversion, so too")
    lines = 'a JSONL file, whose lines are drawn: {"prompt": "a fox", "seed": 1}, and what else differs from the flags'
    parser.add_argument("--prompts", metavar="FILE", help=lines)
    parser.add_argument(
        "--batch", type=number(int, 1), default=1, metavar="N", help="of --prompts, drawn at once (%(default)s)"
    )
    where = "a PNG (minidiff.png), with --prompts a folder (pictures)"
    parser.add_argument("-o", "--output", help=where)
    return parser


def parse(parser: Parser, arguments: list[str], given: argparse.Namespace | None = None) -> argparse.Namespace:
    """The flags, and those `given` before them. Raises ValueError for what can't be meant."""
    args = parser.parse_args(arguments, given and argparse.Namespace(**vars(given)))
    for flag, value in vars(args).items():
        if flag not in ("prompt", "negative") and "" in (value if isinstance(value, list) else [value]):
            parser.error(f"argument {as_flag(flag)}: is empty")
    args.model = BUNDLED if args.model is None else args.model
    args.bundled = args.model == BUNDLED and not Path(BUNDLED).is_dir()
    args.folder = minidiff.bundled(BUNDLED) if args.bundled else args.model
    args.sampler = SCHEDULERS.get(args.scheduler)
    steps, guidance, scale = (20, 3.0, 4) if args.bundled else (None, None, 1)
    args.steps = steps if args.steps is None else args.steps
    args.guidance = guidance if args.guidance is None else args.guidance
    args.scale = scale if args.scale is None else args.scale
    args.output = Path(args.output or ("pictures" if args.prompts else "minidiff.png"))
    here = [kind for kind in ("cuda", "mps", "cpu", "xpu") if getattr(torch, kind).is_available()]
    args.device = args.device or here[0]
    kind, colon, i = args.device.partition(":")
    if kind not in here or (colon and not (i.isdecimal() and int(i) < getattr(torch, kind).device_count())):
        parser.error(f"argument --device: {args.device} isn't there; supported here: {', '.join(here)}")
    args.dtype = args.dtype or ("float16" if kind == "cuda" else "float32")
    if not args.list and args.prompt is None and args.prompts is None:
        parser.error("the following arguments are required: prompt")
    if args.prompts and (args.prompt is not None or args.preview):
        parser.error("argument --prompts: goes neither with another prompt nor with --preview")
    if args.prompts and (Path(args.prompts).is_dir() or not os.access(args.prompts, os.R_OK)):
        parser.error(f"argument --prompts: {args.prompts} must be a file that can be read")
    if args.batch > 1 and not args.prompts:
        parser.error(f"argument --batch: {args.batch} needs --prompts")
    for flag in ("mask", "strength"):
        if vars(args)[flag] is not None and args.image is None and not args.prompts:
            parser.error(f"argument --{flag}: needs --image")
    if len(args.control or ()) != len(args.control_image or ()):
        parser.error("argument --control-image: give one for each --control")
    if args.refiner and args.mask:
        parser.error("argument --refiner: would change what --mask keeps; leave one out")
    if args.safety and args.preview:
        parser.error("argument --preview: shows what --safety might hide; leave one out")
    if not 0 <= args.seed < 2**64 - args.n:
        parser.error(f"argument --seed: {args.seed} must lie in 0..2^64 - {args.n + 1}")
    if args.prompts:
        return args
    if args.output.suffix.lower() != ".png" or not args.output.absolute().parent.is_dir():
        parser.error(f"argument -o: {args.output} must be a .png in a folder that exists")
    if problem := why_not_writable(args.output):
        parser.error(f"argument -o: {args.output} can't be written: {problem}")
    if args.preview and os.path.lexists(preview_file(args)):
        parser.error(f"argument --preview: {preview_file(args)} is there: move it away, or choose another -o")
    return args


def why_not_writable(file: Path) -> str | None:
    """What stands in the way of writing `file`, which is left as it is; None if nothing does."""
    try:
        if file.is_dir():
            return "it is a folder"
        if file.exists():
            file.open("ab").close()
        with tempfile.TemporaryFile(dir=file.absolute().parent):  # where it is written first, to be whole or not at all
            return None
    except OSError as error:
        return error.strerror


def main(arguments: list[str] | None = None) -> int:
    parser, arguments = flags(), sys.argv[1:] if arguments is None else arguments
    try:
        args = parse(parser, arguments)
    except ValueError as error:
        parser.print_usage(sys.stderr)
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)

    if args.list or args.bundled:
        known = json.loads((minidiff.bundled(BUNDLED) / "known.json").read_text(encoding="utf-8"))
        if args.list:
            for kind, those in known.items():
                if kind != "words":  # all that the other lists are made of, and small ones
                    print(f"{kind.capitalize()}: {', '.join(those)}")
            print('One thing or two: "a fox and a cactus on a yellow background"')
            print("What a prompt leaves out may be anything: another seed, another picture (-n 8 draws eight)")
            return 0

    def checked(one: argparse.Namespace) -> argparse.Namespace:
        if one.bundled:
            warn_of_unknown_words(f"{one.prompt} {one.negative or ''}", known["words"])
        return one

    try:
        if args.prompts:
            given = parser.parse_args(arguments)
            given.prompts, given.batch = None, 1
            return draw_many(args, lambda line: checked(parse(parser, line, given)))
        pipe, refiner = load(checked(args))
        call = arguments_of(args, pipe)
        started = time.perf_counter()
        images = draw(pipe, refiner, call)
        steps = pipe.num_timesteps + (refiner.num_timesteps if refiner else 0)
        seconds = (time.perf_counter() - started) / steps
        picture = make_grid(images, args.scale)
        write(picture, args.output, {**vars(args), "scheduler": type(pipe.scheduler).__name__})
    except ERRORS as error:
        print(f"error: {in_flags(error)}", file=sys.stderr)
        return 1
    finally:
        if args.preview:
            preview_file(args).unlink(missing_ok=True)
    print(f"{args.output} ({picture.width} x {picture.height}, {seconds:.3f} s a step on {args.device})")
    if args.bundled:
        print(f"Drawn by the bundled {BUNDLED}; a real one: --model stable-diffusion-v1-5/stable-diffusion-v1-5")
    return 0


def warn_of_unknown_words(prompt: str, words: list[str]) -> None:
    for word in re.findall(r"[^\W_]+", prompt.lower()):
        if word not in words:
            near = difflib.get_close_matches(word, words, n=2, cutoff=0.8)
            hint = f"did you mean {' or '.join(near)}?" if near else "--list prints what it knows"
            warnings.warn(f"{BUNDLED} has never seen the word {word!r}; {hint}", stacklevel=2)


if __name__ == "__main__":
    gc.freeze()  # what the imports made stays: else the collector walks through all of torch at the exit, for 0.4 s
    sys.exit(main())
