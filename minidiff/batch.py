"""Many prompts, many processes: a picture for each line of a file.

    torchrun --nproc-per-node 4 -m minidiff --prompts prompts.jsonl -o pictures

The first process puts batches of lines into the process group's store, and whoever is free takes the next one. Nothing
else is exchanged: what is drawn stands in the manifest, and a start, by however many, leaves alone what is there.

Whoever draws a picture, and beside which others, its file is the same to the bit, because it is computed in the same
shapes, a batch that isn't full being filled up with its last line, and on a CPU by as many threads. Another `--batch`
or number of threads adds up in another order, which shows in the last bits.
"""

import json
import os
import secrets
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from .command import ERRORS, Pipeline, arguments_of, draw, in_flags, load, suited, write
from .images import make_grid
from .manifest import Read, add_record, alone_in, is_there, read_manifest, read_prompts, sha256, sharing

SHAPE = ("strength", "height", "width", "steps", "guidance", "n")  # what the pictures of a batch have in common
WAIT = timedelta(days=7)  # for one another: who is slow may be, and who is dead is noticed at once


def draw_many(args: Namespace, read: Read) -> int:
    """Draws what isn't there yet. Returns the exit code: 1 if a line has no picture."""
    if args.device == "cuda":
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(args.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # alone as under torchrun
    started, failed = time.perf_counter(), []
    store, rank, size, group = join(args.device)
    plan = None
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group) if group else None
        try:
            if rank == 0:
                stack.enter_context(alone_in(args.output))
                plan = publish(args, read, store, failed)
        finally:
            plan = told(plan, group)
        if plan is None:  # the first process says why
            return 1
        stack.enter_context(sharing(args.output))
        stopped = stack.enter_context(finishing())
        pipe, refiner = load(args) if plan["batches"] else (None, None)
        if rank == 0:
            stack.enter_context(bar(store, plan["new"]))
        try:
            while not stopped and (i := store.add("taken", 1)) <= plan["batches"]:
                for line, seconds in draw_batch(store.get(f"batch {i}"), args.batch, pipe, refiner, failed):
                    made = {"file": line.output.name, "sha256": sha256(line.output), "seconds": round(seconds, 3)}
                    record = {"line": line.number, "settings": line.settings, "batch": args.batch}
                    add_record(args.output, record | made)
                    store.add("drawn", 1)
            everyone = [failed] * size
            if group and not stopped:
                dist.all_gather_object(everyone, failed, group=group)
        except RuntimeError as error:
            lost = "another process died, and what it was drawing isn't there; the same command goes on from here"
            raise RuntimeError(lost) from error
    if stopped:
        print("told to stop; the same command goes on from here", file=sys.stderr)
        return 1
    failed = sorted(number for numbers in everyone for number in numbers)
    if rank == 0:
        drawn, seconds = store.add("drawn", 0), time.perf_counter() - started
        print(f"{args.output}: {drawn} pictures drawn in {seconds:.0f} s by {size} at work, {plan['there']} were there")
    if rank == 0 and failed:
        print(f"error: no picture of {len(failed)} lines: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def join(device: str) -> tuple[dist.Store, int, int, dist.ProcessGroup | None]:
    """What the processes share; which of them this is, of how many; and the group in which they speak."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1, None
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes that it starts anew: in it are the addresses of the dead, and their count
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    group = dist.new_group(backend="gloo", timeout=WAIT)
    return dist.PrefixStore(told(secrets.token_hex(8), group), store), rank, size, group


def told(value: Any, group: dist.ProcessGroup | None) -> Any:
    """What the first process says."""
    values = [value]
    if group:
        dist.broadcast_object_list(values, group=group)
    return values[0]


def publish(args: Namespace, read: Read, store: dist.Store, failed: list[int]) -> dict[str, int]:
    """Puts the batches that are to be drawn into the store, and the lines that can't be read into `failed`. Returns
    the number of the batches, of the pictures that are new in them, and of those that are there."""
    records = read_manifest(args.output)
    lines = read_prompts(args.prompts, args.output, read, lambda number, error: tell(number, error, failed))
    for line in lines:
        line.new = not is_there(line, records)
    # Batches are those of the whole file: a picture has the same company wherever a run was cut off
    todo = [batch for batch in batches(lines, args.batch) if any(line.new for line in batch)]
    for i, batch in enumerate(todo, 1):
        store.set(f"batch {i}", json.dumps([vars(line) for line in batch], default=str))
    new = sum(line.new for line in lines)
    return {"batches": len(todo), "new": new, "there": len(lines) - new}


def batches(lines: list[Namespace], most: int) -> Iterator[list[Namespace]]:
    """Lines whose pictures one call can draw."""
    alike: dict[tuple, list[Namespace]] = {}
    for line in lines:
        sized = line.bundled or None not in (line.height, line.width)
        image = line.image is not None if sized else line.image  # a picture may be as large as it likes
        key = (image, line.mask is None, line.negative is None, *(vars(line)[name] for name in SHAPE))
        alike.setdefault(key, []).append(line)
    for group in alike.values():
        yield from (group[first : first + most] for first in range(0, len(group), most))


def draw_batch(
    batch: bytes, width: int, pipe: Pipeline, refiner: Pipeline | None, failed: list[int]
) -> Iterator[tuple[Namespace, float]]:
    """Writes the pictures that are new. Yields their lines, each with its seconds; those without one go to `failed`."""
    lines, begun = [Namespace(**values) for values in json.loads(batch)], time.perf_counter()
    for line, pictures in drawn(lines, width, pipe, refiner, failed):
        if line.new:
            line.output = Path(line.output)
            settings = vars(line) | {"scheduler": type(pipe.scheduler).__name__}
            write(make_grid(pictures, line.scale), line.output, settings)
            yield line, (time.perf_counter() - begun) / len(lines)


def drawn(
    lines: list[Namespace], width: int, pipe: Pipeline, refiner: Pipeline | None, failed: list[int]
) -> Iterator[tuple[Namespace, list[Image.Image]]]:
    """Lines with their pictures, computed as `width` of them. If that fails, each is tried alone."""
    try:
        serving = suited(pipe, lines[0])
        for one in (serving, refiner) if refiner else (serving,):
            one.set_progress_bar_config(disable=True)
        calls = [arguments_of(line, serving) for line in [*lines, *lines[-1:] * (width - len(lines))]]
        pictures = draw(serving, refiner, together(calls))
    except ERRORS as error:
        if len(lines) == 1:
            tell(lines[0].number, error, failed)
            return
        for line in lines:
            yield from drawn([line], width, pipe, refiner, failed) if line.new else ()
        return
    for i, line in enumerate(lines):
        yield line, pictures[i * line.n : (i + 1) * line.n]


def together(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """One call that draws what several do."""
    count, call = calls[0].get("num_images_per_prompt", 1), dict(calls[0])
    for name in {"prompt", "negative_prompt"} & call.keys():
        call[name] = [one[name] for one in calls]
    for name in {"image", "mask_image"} & call.keys():
        call[name] = [one[name] for one in calls for _ in range(count)]
    return call | {"generator": [generator for one in calls for generator in one["generator"]]}


def tell(number: int, error: Exception, failed: list[int]) -> None:
    failed.append(number)
    tqdm.write(f"line {number}: {in_flags(error)}", file=sys.stderr)


@contextmanager
def finishing() -> Iterator[list[int]]:
    """SIGTERM, which torchrun sends to the others when one has died, waits for the batch in work. Yields the signals
    that came."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def bar(store: dist.Store, total: int) -> Iterator[None]:
    """One for all processes."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(0.2):
            shown.update(store.add("drawn", 0) - shown.n)

    with tqdm(total=total, unit="picture") as shown:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            shown.update(store.add("drawn", 0) - shown.n)
