"""The reference and minidiff on the same folder, for time and memory: what `verify` is for the numbers.

Each side runs in a process of its own, in turns, and a row shows the median of all turns. The ratio is what counts:
seconds differ between machines, and on one machine between two hours.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .sides import Inputs, Side
from .stages import TEXT_ENCODERS, VAES, call_arguments, parts_of, predict, random_latents, token_ids
from .verify import BOUNDS, find_folder

SIDES = {"reference": "diffusers", "minidiff": "minidiff"}


def measure(side: Side, inputs: Inputs) -> dict[str, float]:
    """Seconds for each part of the way from folder to picture, and the most memory that it took, in MB."""

    device = torch.get_device_module(inputs.device)

    def seconds(call: Callable[[], Any]) -> float:
        device.synchronize()
        started = time.perf_counter()
        call()
        device.synchronize()
        return time.perf_counter() - started

    pipes: list[Any] = []
    rows = {"load the pipeline": seconds(lambda: pipes.append(side.pipeline()))}
    (pipe,) = pipes
    calls: dict[str, Callable[[], Any]] = {}
    for name, encoder in parts_of(pipe, TEXT_ENCODERS).items():
        calls[f"{name.replace('_', ' ')}, batch of 2"] = partial(encoder, token_ids(encoder, inputs)[:2])
    calls["UNet, batch of 2"] = partial(predict, pipe.unet, inputs, (981, 1))
    for vae in parts_of(pipe, VAES).values():
        calls["VAE, decode one picture"] = partial(vae.decode, random_latents(vae, inputs))
    options = call_arguments(pipe, inputs)
    calls[f"picture, {inputs.steps} steps"] = lambda: pipe(**options)
    with torch.no_grad():
        for name, call in calls.items():
            call()  # the first one chooses kernels and fills caches
            rows[name] = seconds(call)
    if inputs.device.startswith("cuda"):
        rows["peak memory on the device, MB"] = device.max_memory_allocated() / 1e6
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    rows["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
    return rows


def turn(side: str, arguments: list[str]) -> dict[str, float]:
    """One process each for the import and for everything else."""

    def python(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SIDES[side]} failed:\n{done.stderr}")
        return done.stdout.splitlines()[-1]

    watch = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
    imported = python("-c", watch.format(f"from {SIDES[side]} import DiffusionPipeline"))
    measured = python("-m", "weights_compat.bench", *arguments, "--side", side)
    return {"import": float(imported)} | json.loads(measured)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m weights_compat.bench",
        description="Runs one folder with the reference (diffusers, transformers) and with minidiff, in turns. Prints"
        " the median of each part's time and memory, and the ratio minidiff / reference, as a table in Markdown.",
        epilog="A folder with random weights will do: python -m weights_compat.verify NAME --random --full --keep DIR",
    )
    parser.add_argument("name", metavar="NAME", help="a Hub id or a folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    parser.add_argument("--dtype", choices=BOUNDS, default="float32", help="of weights and inputs (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of denoising (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of each side (%(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a turn's process is told
    args = parser.parse_args(arguments)
    for option in ("steps", "turns"):
        if getattr(args, option) < 1:
            parser.error(f"argument --{option}: {getattr(args, option)} is less than 1")
    try:
        args.folder = find_folder(args.name)
    except OSError as error:
        parser.error(f"argument NAME: {error}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.side:
        from minidiff.loading.config import read_json

        index = read_json(args.folder / "model_index.json")
        dtype = getattr(torch, args.dtype)
        side = Side(args.side == "reference", args.folder, index, args.device, dtype)
        print(json.dumps(measure(side, Inputs(args.device, dtype, args.steps, seed=0))))
        return 0

    options = [args.name, "--device", args.device, "--dtype", args.dtype, "--steps", str(args.steps)]
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for side in tqdm(list(SIDES) * args.turns, "turns"):
        turns[side].append(turn(side, options))
    print(f"{args.name}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads; medians of {args.turns}\n")
    print(f"| {'seconds, or MB':<30} | {'reference':>9} | {'minidiff':>9} | ratio |")
    print(f"| {'-' * 30} | {'-' * 8}: | {'-' * 8}: | ----: |")
    for name in turns["minidiff"][0]:
        reference, ours = (statistics.median(row[name] for row in rows) for rows in turns.values())
        form = ",.0f" if name.endswith("MB") else ".3g"
        print(f"| {name:<30} | {reference:>9{form}} | {ours:>9{form}} | {ours / reference:>5.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
