"""Files of weights: which ones a component's folder has, and their tensors, there and back under our names.

    diffusion_pytorch_model.safetensors              text encoders: model.safetensors
    diffusion_pytorch_model.fp16.safetensors         a variant
    diffusion_pytorch_model-00001-of-00002.safetensors, ...          in shards, with
    diffusion_pytorch_model.safetensors.index.json                   the index that says what is where
    diffusion_pytorch_model.bin                      pickles, read through `weights_only`: no code in them is run

Weights are mapped into memory, not copied: a tensor is read from the disk when it is first used.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from weights_compat.rules import Table

from .config import LoadError, read_json, write_json
from .save import is_plain
from .tensors import read_tensors, to_hub, to_ours, untied, write_tensors


class Files(NamedTuple):
    """Which of a folder's files to read or write, and as what: the fields are arguments of `from_pretrained` and
    `save_pretrained`. A dtype of None is that of the files."""

    dtype: torch.dtype | None = torch.float32
    variant: str | None = None
    use_safetensors: bool | None = None
    max_shard_size: int | str = "10GB"


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """`torch_dtype` is the older name. Raises ValueError where the two say different things."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype}, its older name, differ: give one")
    return torch_dtype if dtype is None else dtype


def which_files(dtype: torch.dtype | str | None, variant: str | None, use_safetensors: bool | None) -> Files:
    """Checks these arguments of `from_pretrained`. Raises ValueError or TypeError."""
    if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating-point torch.dtype, "auto" or None, not {dtype!r}')
    if use_safetensors not in (None, True, False):
        raise TypeError(f"use_safetensors must be True, False or None, not {use_safetensors!r}")
    check_variant(variant)
    return Files(None if dtype == "auto" else dtype or torch.float32, variant, use_safetensors)


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
    return next((folder / name for name in candidates(files) if os.path.lexists(folder / name)), None)


def wanted(names: list[str], folder: str, files: Files, small: Collection[str]) -> list[str]:
    """Of all files of a repository, those that loading the component in `folder` reads: the `small` ones, its weights.

    Without weights of the variant, the others.
    """
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
    here = {file.name: file for file in inside}
    first = next((name for name in candidates(files) if name in here), None)
    if first is None and files.variant:
        return wanted(names, folder, files._replace(variant=None), small)
    chosen = {*small, first, *(shards(here, first, files) if first and ".index." in first else ())}
    return [str(file) for file in inside if file.name in chosen]


def replaced(folder: Path, files: Files, small: Collection[str]) -> set[str]:
    """The files in a component's folder that a save of this variant ends: every one that stands for the new ones."""
    names = [file.name for file in folder.iterdir() if not file.is_dir()] if folder.is_dir() else []
    old = {name for name in candidates(files) if name in names}
    return {*small} & {*names} | old | {shard for index in old for shard in shards(names, index, files)}


def shards(names: Iterable[str], index: str, files: Files) -> list[str]:
    """Of `names`, the shards that belong to an index; the variant stands before their number or after it."""
    stem, suffix = index.split(".")[:2]
    dot = rf"\.{files.variant}" if files.variant else ""
    number = r"-\d+-of-\d+"
    return [name for name in names if re.fullmatch(rf"{stem}({dot}{number}|{number}{dot})\.{suffix}", name)]


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
    parts = _shards(file) if ".index." in file.name else [file]
    named = ((part, name, tensor) for part in parts for name, tensor in read_tensors(part, files.dtype))
    return fit(named, files.dtype, table, shapes, owner, file)


def fit(
    named: Iterable[tuple[Path, str, Tensor]],
    dtype: torch.dtype | None,
    table: Table,
    shapes: Mapping[str, torch.Size],
    owner: str,
    file: Path,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The tensors of `shapes` under our names, out of those of files: every one, each of its shape, and no other.

    `named` are the file, name and value of each; `prefix` stands before all names, and isn't the table's.
    """
    tensors: dict[str, Tensor] = {}
    for part, name, tensor in named:
        short = name.removeprefix(prefix)
        if table.is_ignored(short):
            continue
        if not tensor.is_floating_point():
            raise LoadError(f"{part}: the tensor {name} is {tensor.dtype}, not a floating-point type")
        dtype = dtype or tensor.dtype
        for ours, change in table.places(short) or [(short, "same")]:
            if ours not in shapes:
                raise LoadError(f"{part}: the tensor {name} has no place in {owner} with this config")
            if ours in tensors:
                raise LoadError(f"{part}: the tensor {name} comes twice, under two names or in two files")
            changed = to_ours(change, tensor)
            if changed.shape != shapes[ours]:
                made = f"; config.json makes it {tuple(shapes[ours])}"
                raise LoadError(f"{part}: the tensor {name} has shape {tuple(changed.shape)}{made}")
            tensors[ours] = changed.to(dtype)  # no copy if it is that already
    if missing := [name for name in shapes if name not in tensors]:
        first = f"{prefix}{table.hub(missing[0])}"
        raise LoadError(f"{file}: {len(missing)} tensors are missing, the first is {first}")
    return tensors


def write_weights(tensors: Mapping[str, Tensor], stem: str, folder: Path, files: Files, table: Table) -> None:
    """Writes `tensors`, which have our names, under the Hub's: one file, or shards of `max_shard_size` and an index."""
    from huggingface_hub import split_torch_state_dict_into_shards  # takes its time, and most runs save nothing

    whole = as_written(tensors, table)
    dot = f".{files.variant}" if files.variant else ""
    pattern = f"{stem}{dot}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(whole, filename_pattern=pattern, max_shard_size=files.max_shard_size)
    for name, inside in split.filename_to_tensors.items():
        write_tensors(folder / name, {hub: whole[hub] for hub in inside})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index{dot}.json", index)


def as_written(tensors: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The inverse of `fit`: the tensors of a file. Raises ValueError for one of ours that the table has no name for."""
    parts: dict[str, dict[str, Tensor]] = {}
    for ours, tensor in tensors.items():
        if (origin := table.origin(ours)) is None:
            raise ValueError(f"the tensor {ours} has no name in such a file")
        hub, change = origin
        parts.setdefault(hub, {})[change] = tensor
    return untied({hub: to_hub(changed) for hub, changed in parts.items()})


def _shards(index_file: Path) -> list[Path]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index_file}: weight_map must give a file name for each tensor")
    for name in weight_map.values():
        if not is_plain(name):  # the folder is the border
            raise LoadError(f"{index_file}: weight_map names {name!r}, which isn't a file beside it")
        if not os.path.lexists(index_file.parent / name):
            raise LoadError(f"{index_file.parent / name}: no such file, though {index_file.name} names it")
    return [index_file.parent / name for name in dict.fromkeys(weight_map.values())]
