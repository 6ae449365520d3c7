"""A whole system, or one network, in one file with the names that its authors gave: `from_single_file`, and the way
back. The names stand in weights_compat/single_file.py. Such a file has no configs: they are a folder's.
"""

import os
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from weights_compat.rules import Table
from weights_compat.single_file import Original, original
from weights_compat.standard import (
    DOUBTS,
    is_leftover,
    standard_files,
    standard_model,
    standard_named,
    stranger,
    write_files,
)

from ..checks import check_named_tensors
from .arguments import DOWNLOADS, SINGLE_FILE, check_keywords, one_device
from .component import REGISTRY, Component
from .config import LoadError, read_json
from .folder import load_components
from .hub import check_path, fetch, fetch_file
from .model import Model, few
from .save import reading
from .tensors import read_tensors, write_tensors
from .weights import Files, as_written, find_weights, fit, one_dtype, which_files

EMA = "model_ema."  # a mean of the UNet's weights over the last steps of training; their names have no dots inside


class SingleFile(NamedTuple):
    """The tensors of a file, mapped into memory, by its own names."""

    file: Path | str
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, link: str | os.PathLike, hub: Mapping[str, Any]) -> Self:
        """Raises LoadError for a file that isn't there or is damaged."""
        file = fetch_file(link, **hub)
        return cls(file, dict(read_tensors(file)))

    def error(self, problem: str, part: str | None = None) -> LoadError:
        """One that says what the file looks like, if that is known and not the `part` that is read, and else the
        `problem`."""
        what = stranger(self.tensors)
        strange = what is not None and (part is None or part not in what.lower())
        return LoadError(f"{self.file}: {f'looks like {what}' if strange else problem}")

    @contextmanager
    def configs(
        self,
        config: str | os.PathLike | None,
        hub: Mapping[str, Any],
        given: Collection[str],
        part: str | None = None,
    ) -> Iterator[Path]:
        """A folder with the configs that the file goes with: `config`, a folder or a Hub id, or that of the standard
        model that the file is. Those come with the package: no Hub is asked for them, nor for their tokenizers. `given`
        are arguments of the call, one of which may settle what names and shapes don't tell.
        """
        if config is None:
            name, network = standard_model({name: tensor.shape for name, tensor in self.tensors.items()})
            if name is None:
                raise self.error(
                    "is none of the standard models: give config=, a folder or a Hub id with its configs", part
                )
            keyword, doubt = DOUBTS.get((name, network), ("", ""))
            if doubt and keyword not in given:
                warnings.warn(f"{self.file}: {doubt}; config= or {keyword}= ends this warning", stacklevel=5)
        else:
            check_path(config, "config", "a folder or a Hub id")
            name = None if os.path.isdir(config) else standard_named(os.fspath(config))
        if name:
            with tempfile.TemporaryDirectory() as folder:
                write_files(standard_files(name), Path(folder))
                yield Path(folder)
        else:
            folder = fetch(config, lambda names: [n for n in names if n.endswith((".json", ".txt"))], "*.json", **hub)
            with reading(folder):
                yield folder

    def components(
        self,
        index_file: Path,
        given: Mapping[str, Any],
        files: Files,
        expected: Collection[str],
        settings: Mapping[str, type],
        extract_ema: bool,
    ) -> dict[str, Any]:
        """What `load_components` gives, with the weights of this file where it has them."""
        index = read_json(index_file)
        names = (spec[-1] for spec in index.values() if isinstance(spec, list) and isinstance(spec[-1], str))
        kinds = (REGISTRY.get(name) for name in names)
        parts = [kind.part for kind in kinds if kind and issubclass(kind, Model) and kind.part]
        claimed: list[str] = []

        def read(cls: type[Component], folder: Path, files: Files) -> Component:
            if not issubclass(cls, Model):
                return cls.read_from(folder, files)
            model = cls.without_weights(folder, {})
            layout = original(cls.part, model.config, parts)
            prefix = self.prefix(layout) if layout else None
            if prefix:
                claimed.append(prefix)
                return self.fill(model, layout.table, prefix, files.dtype, extract_ema and cls.part == "unet")
            if find_weights(folder, files) and cls.part != "unet":  # a file without one is none
                return cls.read_from(folder, files)
            raise self.error(f"holds no {folder.name}: give it, from_single_file(..., {folder.name}=...)")

        found = load_components(index_file, given, files, expected, settings, read)
        spare = [name for name in self.tensors if not name.startswith(tuple(claimed)) and not is_leftover(name)]
        if spare and len(claimed) == len(parts):
            warnings.warn(f"{self.file}: these tensors are nobody's, and left out: {few(spare)}", stacklevel=3)
        if not extract_ema and any(name.startswith(EMA + "diffusion") for name in self.tensors):
            more = "extract_ema=True takes them, which most draw with"
            warnings.warn(f"{self.file}: has averaged weights of the UNet too: {more}", stacklevel=3)
        return found

    def prefix(self, layout: Original) -> str | None:
        """What the names of a network begin with here; None if it isn't in the file."""
        return next((p for p in layout.prefixes if any(name.startswith(p) for name in self.tensors)), None)

    def fill(self, model: Model, table: Table, prefix: str, dtype: torch.dtype | None, extract_ema: bool) -> Model:
        """`model` with the file's weights. Raises LoadError unless they are just those that it has."""
        found = {key: value for key, value in self.tensors.items() if key.startswith(prefix) and not is_leftover(key)}
        if what := stranger(name for name in found if not table.places(name.removeprefix(prefix))):
            raise LoadError(f"{self.file}: looks like {what}")
        shapes = model.shapes()
        if extract_ema:
            names = [f"{prefix}{table.hub(name)}" for name in shapes]
            means = {name: EMA + "".join(name.split(".")[1:]) for name in names}
            found = {name: self.tensors[mean] for name, mean in means.items() if mean in self.tensors}
            if not found:
                raise LoadError(f"{self.file}: extract_ema=True, but it has no averaged weights, {EMA}...")
        named = ((self.file, name, tensor) for name, tensor in found.items())
        return model.filled(fit(named, dtype, table, shapes, type(model).__name__, self.file, prefix))


class OneFile:
    """A `Model` that comes alone in a file too, or is taken out of one that holds a whole system."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | Mapping[str, Tensor],
        *,
        config: str | os.PathLike | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        extract_ema: bool = False,
        **keywords: Any,
    ) -> Self:
        """The network out of a file with its authors' names or the Hub's, or of a dictionary of such tensors.

        `config`: a folder or a Hub id with its config, there or in `subfolder`; the standard model's that the file is,
        if None. `extract_ema`: the UNet's weights averaged in training, if the file has them. A file that names don't
        tell from another is taken as in the reference: a VAE has `scaling_factor=0.18215`, if neither `config` nor that
        keyword says otherwise (XL's: 0.13025). The other arguments are those of `from_pretrained`.

        Raises LoadError for a file that is missing, damaged, or holds something else; and as `from_pretrained` does.
        """
        files, device = which_files(one_dtype(dtype, torch_dtype), None, None), one_device(device_map)
        own = [key for key in cls.own_keys() if key not in DOWNLOADS]
        known = ("config", "subfolder", "torch_dtype", "dtype", "device_map", "extract_ema", *DOWNLOADS)
        hub = check_keywords(keywords, SINGLE_FILE, cls.__name__, (*known, *own))
        overrides = {key: hub.pop(key) for key in own if key in hub}
        link = pretrained_model_link_or_path_or_dict
        if isinstance(link, Mapping):
            check_named_tensors(link, "pretrained_model_link_or_path_or_dict")
        source = SingleFile("the dictionary", link) if isinstance(link, Mapping) else SingleFile.read(link, hub)
        with source.configs(config, hub, {*overrides, "scheduler"}, cls.part) as folder:
            inside = cls.part if subfolder is None and not (folder / "config.json").exists() else subfolder or ""
            model = cls.without_weights(folder / inside, overrides)
        layout = original(cls.part, model.config, [cls.part])
        prefix = source.prefix(layout) or ""
        table = layout.table if prefix else max(layout.table, cls.table, key=lambda table: table.knows(source.tensors))
        model = source.fill(model, table, prefix, files.dtype, extract_ema)
        return model.to(device) if device else model

    def save_single_file(self, path: str | os.PathLike) -> None:
        """Writes the weights to a `.safetensors` file with their authors' names, which is whole afterwards or as it
        was. The config isn't in it.

        Raises ValueError for a path that isn't a `.safetensors`, or a network that such files don't hold.
        """
        layout = original(self.part, self.config, [self.part])
        write_single_file(path, {layout.alone: (self, layout.table)})


def write_single_file(path: str | os.PathLike, models: Mapping[str, tuple[Model, Table]]) -> None:
    """Writes networks, by the prefix of their names, to one file, which is whole afterwards or as it was."""
    check_path(path, "path", "a .safetensors file")
    file = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    if file.suffix != ".safetensors" or not file.parent.is_dir():
        raise ValueError(f"path={os.fspath(path)!r} must be a .safetensors file in a folder that exists")
    tensors: dict[str, Tensor] = {}
    for prefix, (model, table) in models.items():
        named = as_written(model.checked_tensors(), table)
        tensors |= {f"{prefix}{name}": tensor for name, tensor in named.items()}
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        write_tensors(unfinished, tensors)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
