"""Files of adapters: which one a path means, and LoRA's tensors there and back. Everything is looked at before a
network is changed, so that a file that doesn't fit leaves all as it was."""

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from weights_compat.lora import OTHERS, originals, spellings, split

from ..lora import LowRank, layers
from .config import LoadError, parse_json
from .hub import check_path, fetch
from .save import is_plain, replacing
from .tensors import read_header, read_tensors, untied, write_tensors

LORA = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
ENDS = (".safetensors", ".bin", ".pt", ".ckpt")
METADATA = "lora_adapter_metadata"  # diffusers' key in the file's header: peft's config of each component
MAX_RANK = 2**14  # of real files 512. A pickle may claim any, and hold one number


def find_file(
    path: str | os.PathLike,
    usual: Collection[str],
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Path:
    """The file that `path` is; or the one in a folder or Hub repository: `weight_name`, a `usual` one, the only one."""
    check_path(path, "pretrained_model_name_or_path", "a file, a folder or a Hub id")
    for name, value in (("weight_name", weight_name), ("subfolder", subfolder)):
        check_path(value or ".", name, "a path inside the folder or repository")
    ends = ENDS if use_safetensors is None else ENDS[:1] if use_safetensors else ENDS[1:]
    at = PurePosixPath(subfolder or "", weight_name or "any")  # weight_name may have folders in it too
    wanted = [at.name] if weight_name else [name for name in usual if name.endswith(ends)]

    def choose(names: list[str]) -> list[str]:
        inside = {PurePosixPath(name).name: name for name in names if PurePosixPath(name).parent == at.parent}
        known = [name for name in inside if name.endswith(ends)]
        found = [name for name in wanted if name in inside]
        if not found and (weight_name or len(known) != 1):
            what = f"no {at}" if weight_name else "not one file to read, so give weight_name"
            raise LoadError(f"{path}: has {what}; it has {', '.join(sorted(known)) or 'none'}")
        return [inside[name] for name in (found or known)[:1]]

    if os.path.isfile(path):
        file = Path(path)
    elif str(path).endswith(ENDS) and not os.path.isdir(path):
        raise LoadError(f"{path}: no such file")
    else:
        folder = fetch(path, choose, str(at.parent / (wanted or usual)[0]), **hub)
        file = folder / choose([str(at.parent / file.name) for file in (folder / at.parent).glob("*")])[0]
    if use_safetensors is not None and not file.name.endswith(ends):
        raise LoadError(f"{file}: use_safetensors={use_safetensors} was asked for")
    return file


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors, and what its header says of each component."""
    tensors, says = dict(read_tensors(file)), read_header(file).get(METADATA, "{}")
    return tensors, parse_json(says, f"{file}: {METADATA} in its header")


def write_lora(folder: str | os.PathLike, weight_name: str, tensors: Mapping[str, Tensor], metadata: dict) -> None:
    check_path(folder, "save_directory", "a folder")
    if not (is_plain(weight_name) and weight_name.endswith(ENDS[:1])):
        raise ValueError(f"weight_name={weight_name!r} must be the name of a .safetensors file")
    try:  # sets are lists there, as in the reference: peft's target_modules are one
        header = {METADATA: json.dumps(metadata, default=sorted, indent=2, sort_keys=True)} if metadata else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapters' metadata are no JSON: {error}") from None
    with replacing(Path(folder), {"": lambda _: set()}) as stages:
        write_tensors(stages[""] / weight_name, untied(tensors), header)


def match_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], models: Mapping[str, nn.Module], where: str
) -> dict[str, dict[nn.Module, LowRank]]:
    """For each of the components `models` that has any, the layers' adapters. Raises LoadError, which opens with
    `where`, for a tensor without a place: all of them are listed."""
    homes, found, unknown = {}, {}, []
    for component, model in models.items():
        table = originals(model.config)
        for ours, hub, layer in layers(model):
            original = table and table.hub(f"{ours}.weight")
            for spelling in spellings(hub, original and original.removesuffix(".weight")):
                homes[component, spelling] = (component, hub, layer)
    for key, tensor in tensors.items():
        if other := next((kind for word, kind in OTHERS.items() if word in str(key)), None):
            raise LoadError(f"{where}: {key} belongs to {other}; minidiff reads plain LoRA")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise LoadError(f"{where}: {key} is {getattr(tensor, 'dtype', type(tensor).__name__)}: not a number each")
        component, spelling, part = split(str(key)) or ("", "", "")
        home = homes.get((component, spelling))
        if home is None:
            unknown.append(str(key))
        elif part in found.setdefault(home, {}):
            raise LoadError(f"{where}: {key} comes twice, under two names")
        else:
            found[home][part] = tensor
    if unknown or not found:
        some = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        fits = f"{len(unknown)} of {len(tensors)} tensors fit no layer of this pipeline's {', '.join(models)}"
        raise LoadError(f"{where}: {fits}. Is it LoRA, and of this model? They are: {some or 'none'}")
    pairs: dict[str, dict[nn.Module, LowRank]] = {}
    for (component, hub, layer), parts in found.items():
        name, prefix = f"{where}: {component}.{hub}", f"{component}."
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        pairs.setdefault(component, {})[layer] = _low_rank(name, hub, layer.weight.shape, parts, config)
    return pairs


def _low_rank(where: str, hub: str, W: torch.Size, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    A, B = parts.get("A"), parts.get("B")
    if A is None or B is None:
        raise LoadError(f"{where} has {' and '.join(parts)} alone; LoRA is A and B (down and up)")
    r = A.shape[0] if A.ndim else 0
    if not 0 < r <= MAX_RANK or A.shape != (r, *W[1:]) or B.shape != (W[0], r, *[1] * (len(W) - 2)):
        takes = f"{('r', *W[1:])} and {(W[0], 'r', *[1] * (len(W) - 2))}, r up to {MAX_RANK}"
        raise LoadError(f"{where} has A of {tuple(A.shape)} and B of {tuple(B.shape)}; the layer takes {takes}")
    return LowRank(A, B, _scale(where, hub, r, parts.get("alpha"), config))


def _scale(where: str, hub: str, r: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    """alpha / r: alpha is a tensor in kohya's files, in the header of diffusers', and r where neither says it."""
    value, root = config.get("lora_alpha", r), config.get("use_rslora")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise LoadError(f"{where} has alpha_pattern={patterns!r:.100} in its header; it must be alphas by layer")
    for end, own in patterns.items():
        value = own if f".{hub}".endswith(f".{end.removeprefix('^')}") else value
    if alpha is not None:
        value = alpha.item() if alpha.numel() == 1 else math.nan
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadError(f"{where} has alpha={value}; it must be a number")
    if config.get("use_dora"):
        raise LoadError(f"{where} belongs to DoRA; minidiff reads plain LoRA")
    return value / (math.sqrt(r) if root else r)
