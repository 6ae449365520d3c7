"""The reference and minidiff on the same folder, side by side, stage by stage: is each number the reference's number?

A stage loads the reference's component, runs it, drops it, and does the same with minidiff's: memory holds one model
at a time, of one side.
"""

import argparse
import gc
import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .manifests import at_sample_size, narrow, read_manifest, steered, steered_name
from .random_folder import make_random_folder
from .sides import Inputs, Side
from .stages import WIDTH, make_stages

# The largest |difference| that passes, relative to the reference's largest value. In half precision both sides round
# at every operation, in whatever order their kernels take them, and guidance carries that through all steps: a bound
# there, five units in the last place, tells of overflow and gross mistakes. Two layers swapped in the middle of a UNet
# can hide below it, and stand out a hundredfold in float32
BOUNDS = {
    "float32": {"ids": 0, "scheduler": 1e-6, "states": 2e-5, "unet": 2e-5, "vae": 2e-5, "picture": 1e-4},
    "float16": {"ids": 0, "scheduler": 5e-3, "states": 5e-3, "unet": 5e-3, "vae": 5e-3, "picture": 5e-2},
    "bfloat16": {"ids": 0, "scheduler": 4e-2, "states": 4e-2, "unet": 4e-2, "vae": 4e-2, "picture": 2e-1},
}


RANDOM = Path()  # --controlnet without a folder


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
        return f"{self.stage:<{WIDTH}}{numbers}  {'PASS' if self.passed else 'FAIL'}{end}"


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


def verify_single_file(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> Iterator[Result]:
    """The folder's networks in one file: what the reference and minidiff read there is what the folder holds."""
    pipelines = [Side(reference, folder, index, "cpu", dtype).pipeline() for reference in (True, False)]
    given = {name: None for name in ("feature_extractor", "safety_checker") if name in index}
    options = {"config": str(folder), "torch_dtype": dtype, **given}
    with tempfile.TemporaryDirectory(prefix="minidiff-") as place:
        file = Path(place) / "model.safetensors"
        try:
            pipelines[1].save_single_file(file)
        except ValueError as error:  # a system that such files don't hold
            yield Result("single file", 0, error=str(error))
            return
        for side, pipe in zip(("the reference", "minidiff"), pipelines, strict=True):
            try:
                read = type(pipe).from_single_file(str(file), **options)
            except Exception as error:  # as in `verify`
                yield Result(f"single file: {side}", 0, error=f"{type(error).__name__}: {error}")
                continue
            for name, network in pipe.components.items():
                if isinstance(network, torch.nn.Module):
                    expected, actual = network.state_dict(), getattr(read, name).state_dict()
                    found = [actual.get(key, torch.empty(0)) for key in expected]
                    yield compare(f"single file: {name}, {side}", 0, list(expected.values()), found)


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
    size.add_argument("--full", action="store_true", help="with --random: at real size (disk: SD 1.5 5.5 GB, XL 14)")
    parser.add_argument("--sample", metavar="N", type=int, help="with --random: height and width of what the UNet sees")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="with --random: make the folder here, and leave it")
    parser.add_argument(
        "--single-file", action="store_true", help="the folder's networks in one file too, there and back"
    )
    net = "with a ControlNet beside the UNet: a net's folder, or none with --random: random weights too"
    parser.add_argument("--controlnet", metavar="DIR", type=Path, nargs="?", const=RANDOM, help=net)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    parser.add_argument("--dtype", choices=BOUNDS, default="float32", help="of weights and inputs (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of denoising (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs (%(default)s)")
    args = parser.parse_args(arguments)
    if not args.random and (args.small or args.full or args.sample or args.keep):
        parser.error("--small, --full, --sample and --keep go with --random")
    if args.controlnet is RANDOM and not args.random:
        parser.error("argument --controlnet: needs a net's folder, without --random")
    if args.keep and args.keep.exists():
        parser.error(f"argument --keep: {args.keep} exists")
    for name in ("steps", "sample"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"argument --{name}: {value} is less than 1")
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
                manifest = at_sample_size(manifest, args.sample) if args.sample else manifest
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
        print(f"{'stage':<{WIDTH}}{'max |diff|':>12}{'relative':>12}{'bound':>10}")
        results, dtype = [], getattr(torch, args.dtype)
        single = verify_single_file(folder, index, dtype) if args.single_file else ()
        for result in chain(verify(folder, index, Inputs(args.device, dtype, args.steps, args.seed)), single):
            print(result, flush=True)
            results += [result] if isinstance(result, Result) else []
    failed = [result.stage for result in results if not result.passed]
    print(f"\n{len(results) - len(failed)} of {len(results)} PASS" + (f"; FAIL: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
