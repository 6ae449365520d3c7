"""The reference and minidiff on the same folder, for time and memory: what `verify` is for the numbers.

Each side runs in a process of its own, in turns, and a row shows the median of all turns. The ratio is what counts:
seconds differ between machines, and on one machine between two hours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .sides import Inputs, Side
from .stages import TEXT_ENCODERS, VAES, call_arguments, parts_of, predict, random_latents, token_ids
from .sweep import draw_powers, exponent, sweep
from .verify import BOUNDS, find_folder

SIDES = {"reference": "diffusers", "minidiff": "minidiff"}
PROCESS = Path("/proc/self")  # Linux


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


class Watch:
    """What calls on a device take."""

    def __init__(self, device: str):
        self.device, self.on_cpu = torch.get_device_module(device), device == "cpu"

    def seconds(self, call: Callable[[], Any]) -> float:
        self.device.synchronize()
        started = time.perf_counter()
        call()
        self.device.synchronize()
        return time.perf_counter() - started

    def memory(self, name: str, call: Callable[[], Any], loads: bool = False) -> dict[str, int]:
        """A row, in MB: the most memory at once beyond what is there afterwards, weights mostly; with `loads` beyond
        what was there before. No row where the system doesn't tell."""
        if not self.on_cpu and hasattr(self.device, "reset_peak_memory_stats"):
            self.device.reset_peak_memory_stats()
            before = self.device.memory_allocated()
            call()
            peak, after = self.device.max_memory_allocated(), self.device.memory_allocated()
        elif self.on_cpu and PROCESS.exists():
            (PROCESS / "clear_refs").write_text("5")  # sets the peak, VmHWM, back
            before = self._resident("VmRSS")
            call()
            peak, after = self._resident("VmHWM"), self._resident("VmRSS")
        else:
            call()
            return {}
        return {name: round((peak - (before if loads else after)) / 1e6)}

    def _resident(self, name: str) -> int:
        lines = dict(line.split(":") for line in (PROCESS / "status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024


def measure(side: Side, inputs: Inputs, quick: bool = False, large: bool = False) -> dict[str, float]:
    """Seconds for each part of the way from folder to picture, and the memory that it takes, in MB."""
    watch, rows, pipes = Watch(inputs.device), {}, []

    def load() -> None:
        rows["load the pipeline"] = watch.seconds(lambda: pipes.append(side.pipeline()))

    def draw() -> None:
        rows["picture"] = watch.seconds(lambda: pipe(**call_arguments(pipe, inputs)))

    memory = watch.memory("load the pipeline, MB", load, loads=True)
    (pipe,) = pipes
    if quick and not side.reference:
        pipe.optimize()
    with torch.no_grad():
        memory |= watch.memory("picture, MB beyond weights", draw)
        calls: dict[str, Callable[[], Any]] = {}
        for name, encoder in parts_of(pipe, TEXT_ENCODERS).items():
            calls[f"{name.replace('_', ' ')}, batch of 2"] = partial(encoder, token_ids(encoder, inputs)[:2])
        calls["UNet, batch of 2"] = partial(predict, pipe.unet, inputs, (981, 1))
        for vae in parts_of(pipe, VAES).values():
            calls["VAE, decode one picture"] = partial(vae.decode, random_latents(vae, inputs))
        for name, call in calls.items():
            call()  # the first one chooses kernels and fills caches
            rows[name] = watch.seconds(call)
        if not quick:  # the quicker ways are of many short operations
            with Operations() as operations:
                calls["UNet, batch of 2"]()
            memory["UNet, operations of torch"] = operations.count
        for vae in parts_of(pipe, VAES).values() if large else ():
            z = random_latents(vae, inputs)
            memory |= watch.memory("VAE, twice the size, MB", partial(vae.decode, z.repeat(1, 1, 2, 2)))
            vae.enable_tiling()
            memory |= watch.memory("VAE, in tiles, 4 times, MB", partial(vae.decode, z.repeat(1, 1, 4, 4)))
    return rows | memory


def turn(side: str, arguments: list[str]) -> dict[str, float]:
    """One process each for the import and for everything else."""
    # Installed packages are there as bytecode, and a clone is after its first import
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def python(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{SIDES[side]} failed:\n{done.stderr}")
        return done.stdout.splitlines()[-1]

    watch = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"
    _, imported = (float(python("-c", watch.format(f"from {SIDES[side]} import DiffusionPipeline"))) for _ in range(2))
    rows = json.loads(python("-m", "weights_compat.bench", *arguments, "--side", side))
    whole = imported + rows["load the pipeline"] + rows["picture"]
    return {"import": imported, "from the start to a picture": whole} | rows


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
    parser.add_argument("--optimize", action="store_true", help="minidiff's pipeline: `pipe.optimize()`")
    parser.add_argument("--large", action="store_true", help="the memory of large pictures in the VAE too")
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="instead: how minidiff's time grows, drawn here")
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
    if args.side or args.sweep:
        from minidiff.loading.config import read_json

        dtype = getattr(torch, args.dtype)
        index, inputs = read_json(args.folder / "model_index.json"), Inputs(args.device, dtype, args.steps, seed=0)
        side = Side(args.side == "reference", args.folder, index, args.device, dtype)
    if args.side:
        print(json.dumps(measure(side, inputs, args.optimize, args.large)))
        return 0
    if args.sweep:
        pipe = side.pipeline()
        if args.optimize:
            pipe.optimize()
        rows = sweep(pipe, inputs, Watch(args.device).seconds)
        for name, points in rows.items():
            print(f"{name}: seconds grow with the power {exponent(points):.2f}:", *(f"{x}: {y:.3g}" for x, y in points))
        draw_powers(rows, args.sweep)
        return 0

    options = [args.name, "--device", args.device, "--dtype", args.dtype, "--steps", str(args.steps)]
    options += [f"--{flag}" for flag in ("optimize", "large") if getattr(args, flag)]
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for side in tqdm(list(SIDES) * args.turns, "turns"):
        turns[side].append(turn(side, options))
    how = f"{args.name}, {args.device}, {args.dtype}, {args.steps} steps, {torch.get_num_threads()} threads"
    print(f"{how}{', optimize()' if args.optimize else ''}, medians of {args.turns}:\n")
    print(f"| {'seconds, or MB':<30} | {'reference':>9} | {'minidiff':>9} | ratio |")
    print(f"| {'-' * 30} | {'-' * 8}: | {'-' * 8}: | ----: |")
    for name in turns["minidiff"][0]:
        reference, ours = (statistics.median(row[name] for row in rows) for rows in turns.values())
        form = ",.0f" if isinstance(turns["minidiff"][0][name], int) else ".3g"
        ratio = f"{ours / reference:.2f}" if reference else ""
        print(f"| {name:<30} | {reference:>9{form}} | {ours:>9{form}} | {ratio:>5} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
