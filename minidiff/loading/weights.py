"""Files of weights: which ones a component's folder has, and their tensors under our names.

    diffusion_pytorch_model.safetensors    whole, or in shards with an index; text encoders: model.safetensors
    diffusion_pytorch_model.fp16.safetensors                     a variant
    diffusion_pytorch_model.bin            pickles, read through `weights_only`: no code in them is run

Weights are mapped into memory, not copied: a tensor is read from the disk when it is first used.
"""

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights_compat.rules import Table

from .config import LoadError, read_json


class Files(NamedTuple):
    """Which of a folder's files to read, and as what: the fields are arguments of `from_pretrained`."""

    dtype: torch.dtype = torch.float32
    variant: str | None = None
    use_safetensors: bool | None = None


def which_files(dtype: torch.dtype | None, variant: str | None, use_safetensors: bool | None) -> Files:
    """Checks these arguments of `from_pretrained`. Raises ValueError or TypeError."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, not {dtype!r}")
    if use_safetensors not in (None, True, False):
        raise TypeError(f"use_safetensors must be True, False or None, not {use_safetensors!r}")
    check_variant(variant)
    return Files(dtype or torch.float32, variant, use_safetensors)


def check_variant(variant: str | None) -> None:
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f'variant must be a word such as "fp16", not {variant!r}')


def candidates(files: Files) -> Iterator[str]:
    """Every name that a component's weights, or the index of their shards, can have; the preferred one first."""
    dot = f".{files.variant}" if files.variant else ""
    if files.use_safetensors is not False:
        for stem in ("diffusion_pytorch_model", "model"):
            yield f"{stem}{dot}.safetensors"
            yield f"{stem}.safetensors.index{dot}.json"
    if not files.use_safetensors:
        for stem in ("diffusion_pytorch_model", "pytorch_model"):
            yield f"{stem}{dot}.bin"
            yield f"{stem}.bin.index{dot}.json"


def find_weights(folder: Path, files: Files) -> Path | None:
    """The file of a component's weights, or the index of its shards; None if it has neither."""
    return next((folder / name for name in candidates(files) if (folder / name).exists()), None)


def wanted(names: list[str], folder: str, files: Files, small: Collection[str]) -> list[str]:
    """Of all files of a repository, those that loading the component in `folder` reads: the `small` ones, its weights.

    Without weights of the variant, the others.
    """
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
    chosen = [file for file in inside if file.name in small]
    here = {file.name: file for file in inside}
    first = next((name for name in candidates(files) if name in here), None)
    if first is None and files.variant:
        return wanted(names, folder, files._replace(variant=None), small)
    if first is not None:
        chosen.append(here[first])
    if first is not None and ".index." in first:
        stem, suffix = first.split(".")[:2]
        chosen += [file for file in inside if re.fullmatch(rf"{stem}.*-\d+-of-\d+.*\.{suffix}", file.name)]
    return [str(file) for file in chosen]


def read_weights(
    folder: Path, files: Files, table: Table, shapes: Mapping[str, torch.Size], owner: str
) -> dict[str, Tensor]:
    """The tensors of `shapes` under our names: every one, each of its shape, and no other. `owner` is for messages."""
    file = find_weights(folder, files)
    if file is None:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
        raise LoadError(
            f"{folder}: no weights found; looked for {', '.join(candidates(files))}."
            f" It holds {', '.join(others) or 'no weight files at all'}"
        )
    tensors: dict[str, Tensor] = {}
    for part in _shards(file) if ".index." in file.name else [file]:
        read = _read_safetensors if part.suffix == ".safetensors" else _read_pickle
        for name, tensor in read(part):
            if table.is_ignored(name):
                continue
            ours = table.ours(name)
            if ours not in shapes:
                raise LoadError(f"{part}: the tensor {name} has no place in {owner} with this config")
            if ours in tensors:
                raise LoadError(f"{part}: the tensor {name} comes twice, under two names or in two files")
            if tensor.shape != shapes[ours]:
                raise LoadError(
                    f"{part}: the tensor {name} has shape {tuple(tensor.shape)}; config.json makes it"
                    f" {tuple(shapes[ours])}"
                )
            if not tensor.is_floating_point():
                raise LoadError(f"{part}: the tensor {name} is {tensor.dtype}, not a floating-point type")
            tensors[ours] = tensor.to(files.dtype)  # no copy if it is that already
    if missing := [name for name in shapes if name not in tensors]:
        raise LoadError(f"{file}: {len(missing)} tensors are missing, the first is {table.hub(missing[0])}")
    return tensors


def _shards(index_file: Path) -> list[Path]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index_file}: weight_map must give a file name for each tensor")
    for name in weight_map.values():
        if name != PurePosixPath(name).name or "\\" in name:  # the folder is the border
            raise LoadError(f"{index_file}: weight_map names {name!r}, which isn't a file beside it")
        if not (index_file.parent / name).exists():
            raise LoadError(f"{index_file.parent / name}: no such file, though {index_file.name} names it")
    return [index_file.parent / name for name in dict.fromkeys(weight_map.values())]


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file}: not a whole safetensors file: {error}") from None


def _read_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:  # weights_only: no code in the file is run. Only torch's present format, a zip, can be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # pickle, zip and torch each have their own, and any byte of the file can be wrong
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{file}: can't be read as a file of weights alone: {problem}") from None
    if not isinstance(tensors, dict):
        raise LoadError(f"{file}: must hold a dictionary of tensors, not {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LoadError(f"{file}: {name!r} is {type(tensor).__name__}, not a tensor")
        yield name, tensor
