"""One file of tensors: read, written, and the form that a tensor has there and here."""

import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights_compat.standard import stranger

from .config import LoadError, check_readable

PIECE = 2**28  # bytes of a file that is converted: about so many are in memory beside the result


def read_tensors(file: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, mapped into memory. Raises LoadError, with the file's name.

    Where they will be converted to `dtype`, the file is mapped anew after each PIECE: what was read before goes from
    memory, as far as none of it is kept as it is.
    """
    check_readable(file)
    return _read_safetensors(file, dtype) if file.suffix == ".safetensors" else _read_pickle(file)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:  # OSError: a folder, say
        raise LoadError(f"{file}: not a whole safetensors file: {error}") from None


def _read_safetensors(file: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    names, before = None, file.stat()
    while names is None or names:
        with _opened(file) as tensors:
            if not os.path.samestat(before, file.stat()):
                raise LoadError(f"{file}: was replaced while it was read: load again")
            names, converted = tensors.keys() if names is None else names, 0
            while names and converted < PIECE:
                name, *names = names
                tensor = tensors.get_tensor(name)
                converted += tensor.nbytes if dtype not in (None, tensor.dtype) else 0
                yield name, tensor


def read_header(file: Path) -> dict[str, str]:
    """What a safetensors file says besides its tensors; nothing for other files."""
    check_readable(file)
    if file.suffix != ".safetensors":
        return {}
    with _opened(file) as tensors:
        return tensors.metadata() or {}


def read_pickle(file: Path) -> Any:
    """What a file of pickled tensors holds. Raises LoadError, with the file's name."""
    check_readable(file)
    try:  # weights_only: no code in the file is run. Only torch's present format, a zip, can be mapped
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # pickle, zip and torch each have their own, and any byte of the file can be wrong
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{file}: can't be read as a file of weights alone: {problem}") from None


def _read_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    tensors = read_pickle(file)
    for _ in range(2):  # what training libraries wrap around the weights
        tensors = tensors["state_dict"] if isinstance(tensors, dict) and "state_dict" in tensors else tensors
    if not isinstance(tensors, dict):
        raise LoadError(f"{file}: must hold a dictionary of tensors, not {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            looks = f"; looks like {what}" if (what := stranger(map(str, tensors))) else ""
            raise LoadError(f"{file}: {name!r} is {type(tensor).__name__}, not a tensor{looks}")
        yield name, tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] = MappingProxyType({})) -> None:
    """A safetensors file, with the mode that any new file gets. Raises OSError, with the file's name."""
    file.touch()
    mode = file.stat().st_mode  # save_file's own is 0600, whatever the umask says
    try:
        save_file(dict(tensors), file, metadata={"format": "pt", **header})
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: tensors that share a part of their memory
        raise OSError(f"{file}: can't be written: {error}") from None
    file.chmod(stat.S_IMODE(mode))


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: each whole, and in memory of its own."""
    whole, places = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        whole[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return whole


def to_ours(change: str, tensor: Tensor) -> Tensor:
    """A tensor of a file in our form; `change` is the third column of the tables of names."""
    match change.split():
        case ["same"]:
            return tensor
        case ["transpose"]:
            return tensor.transpose(0, -1)
        case ["convolution"]:  # (out, in, 1, 1) -> (out, in). Biases, and files that have (out, in), are the same
            return tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor
        case ["third", number]:  # (3 * out, in) -> (out, in)
            return tensor.tensor_split(3)[int(number)] if tensor.ndim else tensor
    raise ValueError(f"change={change!r} is not known")


def to_hub(changed: Mapping[str, Tensor]) -> Tensor:
    """The inverse: from those of our tensors that are one tensor in a file, by their change."""
    if "third 0" in changed:
        return torch.cat([changed[f"third {number}"] for number in range(3)])
    ((change, tensor),) = changed.items()
    if change == "convolution" and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor.t() if change == "transpose" else tensor
