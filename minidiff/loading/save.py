"""Saving: a folder that afterwards holds all of the new, or is as it was. Other files in it stay."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import LoadError


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: can't be written: {error}") from None


@contextmanager
def replacing(folder: Path, own: Callable[[Path], set[str]]) -> Iterator[Path]:
    """A new folder to write to. When the block ends well it takes the place of `folder`, by two renames.

    `own(folder)` names the old files that end with this save; all others are carried over, as links where the file
    system has them. If the block fails, or the process dies in it, `folder` is untouched. If the process dies between
    the renames, the old folder lies beside, where loading finds it and the next save puts it back.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it points to is replaced
    new, old = folder.with_name(f".{folder.name}.saving"), displaced(folder)
    if folder.exists() and not folder.is_dir():
        raise LoadError(f"{folder}: a file of that name is in the way")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            _carry_over(folder, new, own(folder))
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def displaced(folder: Path) -> Path:
    """Where the old folder lies in the instant in which a save puts the new one in its place."""
    folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.replaced"


def _carry_over(old: Path, new: Path, own: set[str]) -> None:
    for file in old.rglob("*"):
        name = file.relative_to(old)
        target = new / name
        if name.as_posix() in own or target.exists():
            continue
        if file.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(file))
        elif file.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without hard links
                shutil.copy2(file, target)
