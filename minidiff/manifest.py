"""The files of many prompts: the lines that say what to draw, and the manifest, which says what is drawn.

Both are JSONL, an object a line. A record of the manifest is whole or not there: it is written at once, under a lock,
after its picture, and what a process that died left of one is cut off by whoever writes next.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from .command import RECORDED, as_flag, scaled
from .loading.save import locked

MANIFEST = "manifest.jsonl"
LOCK = ".lock"  # of the run in the folder; the file stays
KEYS = ("prompt", "negative", "image", "mask", "strength", "height", "width", "steps", "guidance", "seed", "n")
# What a picture depends on, beside `files`
SETTINGS = (*RECORDED, "karras", "dtype", "optimize", "variant", "safety", "scale")

Read = Callable[[list[str]], Namespace]


def read_prompts(file: str, folder: Path, read: Read, failed: Callable[[int, Exception], None]) -> list[Namespace]:
    """What the command would do for each line, if it were given the line's keys as flags, which `read` reads.

    To that it adds the line's `number`, from 1, and its `settings`, as they were asked for. `failed` is told of lines
    that can't be read; empty ones are none.
    """
    lines, digest = [], cache(sha256)
    with open(file, "rb") as rows:
        for number, row in enumerate(rows, 1):
            if row.strip():
                try:
                    line = read([f"--output={folder / f'{number:05}.png'}", *_flags(row)])
                    line.number = number
                    line.settings = {key: vars(line)[key] for key in SETTINGS if vars(line)[key] is not None}
                    line.settings["device"] = line.device.partition(":")[0]
                    line.settings["files"] = {str(file): digest(file) for file in _files_of(line)}
                    lines.append(line)
                except (OSError, ValueError, RecursionError) as error:
                    failed(number, error)
    return lines


def _files_of(line: Namespace) -> list[Path]:
    """What a picture depends on beside the models, which are told by their names alone: they are large."""
    pictures = [Path(file) for file in (line.image, line.mask, *(line.control_image or ())) if file is not None]
    adapters = [Path(place) for place in (*line.embedding, *(scaled(lora)[0] for lora in line.lora))]
    inside = [file for place in adapters for file in sorted(place.glob("*"))]
    return [file for file in (*pictures, *adapters, *inside) if file.is_file()]


def _flags(row: bytes) -> list[str]:
    given = json.loads(row.decode("utf-8-sig"))
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError('it must be an object with a prompt, such as {"prompt": "a fox", "seed": 1}')
    for key, value in given.items():
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a line takes {', '.join(KEYS)}"
            raise ValueError(f"{key!r} is not known: {hint}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{key} is {json.dumps(value)}, which is neither a text nor a number")
        str(value).encode()  # half a pair of surrogates goes into no file
    flags = (f"{as_flag(key)}={value}" for key, value in given.items() if key != "prompt")
    return [*flags, "--", given["prompt"]]


def alone_in(folder: Path) -> ExitStack:
    """Makes the folder, and locks it to other runs. Raises OSError where one is at work, or a process is left of it,
    which has `sharing`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
        with ExitStack() as stack:
            stack.enter_context(locked([folder / LOCK], wait=False))
            with locked([folder], wait=False):
                return stack.pop_all()
    except BlockingIOError:
        raise OSError(f"{folder}: another run draws into it") from None
    except OSError as error:
        raise OSError(f"-o: {folder} can't be a folder for pictures: {error.strerror or error}") from None


def sharing(folder: Path) -> Any:
    return locked([folder], shared=True)


def is_there(line: Namespace, records: dict[int, dict[str, Any]]) -> bool:
    """Whether the line's picture is drawn, with these settings, and is still what was written then."""
    record = records.get(line.number)
    there = record is not None and record["settings"] == line.settings and line.output.is_file()
    return there and record["sha256"] == sha256(line.output)


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[int, dict[str, Any]]:
    """The last record of each line that has one."""
    file, records = folder / MANIFEST, {}
    file.touch()
    _cut_half_a_record(file)
    for number, row in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(row)
            records[record["line"]] = {key: record[key] for key in ("settings", "sha256")}
        except (ValueError, TypeError, KeyError):
            where = f"{file}, line {number}"
            raise ValueError(f"{where}: not a picture's record. Delete the line: the picture is drawn anew") from None
    return records


def add_record(folder: Path, record: dict[str, Any]) -> None:
    """Adds a line to the manifest."""
    file, row = folder / MANIFEST, json.dumps(record).encode() + b"\n"
    with locked([file]):
        _cut_half_a_record(file)
        to = os.open(file, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(to, row) < len(row):
                raise OSError(f"{file}: no place for a whole record")
            os.fsync(to)
        finally:
            os.close(to)


def _cut_half_a_record(file: Path) -> None:
    with file.open("rb+") as rows:
        end = rows.seek(0, os.SEEK_END)
        rows.seek(max(0, end - 1))
        if rows.read(1) not in (b"", b"\n"):
            rows.seek(0)
            rows.truncate(rows.read().rfind(b"\n") + 1)
