"""The base of everything that a folder holds: models, schedulers, tokenizers. A class enters the registry by being
defined, and says of itself what loading must know, so that loading knows no class by name.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weights_compat.rules import Table

from .config import Config, ConfigError, LoadError, read_json, write_json
from .hub import check_path, fetch
from .push import Pushable
from .save import replacing, write_tensors
from .switches import Switches
from .weights import Files, check_variant, read_weights, wanted, which_files

FORMAT_VERSION = "0.42.0"  # of diffusers, whose folder layout this is

REGISTRY: dict[str, type["Component"]] = {}  # by the class names that folders give


class Component(Pushable):
    """What has a folder, or a part of one: `from_pretrained` and `save_pretrained`.

    A subclass says its `library` in model_index.json, other class names that it answers to (`aliases`), and the
    small files that it reads (`files`), which a save replaces together with its weights.
    """

    library: ClassVar[str] = "diffusers"
    aliases: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ("config.json",)

    def __init_subclass__(cls, abstract: bool = False, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in () if abstract else (cls.__name__, *vars(cls).get("aliases", ())):
            known = REGISTRY.get(name)
            if known is None or known.__module__ == cls.__module__:  # a notebook's cell may define its class again
                REGISTRY[name] = cls

    @classmethod
    def read_from(cls, folder: Path, files: Files) -> Self:
        """The object in a local folder. Raises LoadError and ConfigError, which name the file."""
        raise NotImplementedError

    def write_to(self, folder: Path, variant: str | None) -> None:
        """Writes the object's files into an empty folder."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads one model, scheduler or tokenizer from a folder or Hub repository, or from a `subfolder` of it.

        `dtype` (`torch_dtype` is its older name): of the weights; float32 if None, whatever the files hold. `variant`:
        of the files, such as "fp16". `use_safetensors`: True takes no pickles, False only pickles; None prefers
        safetensors. `revision`, `cache_dir`, `token`, `local_files_only` are huggingface_hub's.

        Raises LoadError for a missing or damaged file, ConfigError for a key or value that isn't supported.
        """
        files = which_files(dtype or torch_dtype, variant, use_safetensors)
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        first = f"{subfolder}/*config.json" if subfolder else "*config.json"

        def names(all_names: list[str]) -> list[str]:
            return wanted(all_names, subfolder or "", files, cls.files)

        return cls.read_from(fetch(pretrained_model_name_or_path, names, first, **hub) / (subfolder or ""), files)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, variant: str | None = None, safe_serialization: bool = True
    ) -> None:
        """Writes the Hub's layout to `save_directory`, which afterwards holds all of it or is as it was."""
        check_save(save_directory, variant, safe_serialization)
        with replacing(Path(save_directory), lambda old: self.replaced(old, variant)) as new:
            self.write_to(new, variant)

    @classmethod
    def replaced(cls, folder: Path, variant: str | None) -> set[str]:
        """The files in a component's folder that loading it, in this variant, would read: a save ends them all."""
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        kinds = [Files(variant=variant, use_safetensors=kind) for kind in (True, False)]
        return {name for files in kinds for name in wanted(names, "", files, cls.files)}


class Configured(Component, abstract=True):
    """Base of everything with a config. The constructor takes the keys of `Config`, by position or by name."""

    Config: ClassVar[type[Config]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "Config" in vars(cls):  # so that help() and editors show the keys, with their defaults
            cls.__signature__ = inspect.signature(cls.Config)

    def __init__(self, *args, **kwargs):
        super().__init__()
        if len(args) == 1 and not kwargs and isinstance(args[0], self.Config):
            self.config = args[0]
            return
        names = [field.name for field in fields(self.Config) if not field.kw_only]
        if len(args) > len(names) or (twice := kwargs.keys() & names[: len(args)]):
            problem = f"{len(args)} positional arguments" if len(args) > len(names) else f"{min(twice)} twice"
            raise TypeError(f"{type(self).__name__} was given {problem}; by position it takes {', '.join(names)}")
        self.check_own(kwargs)
        self.config = self.Config.read({**dict(zip(names, args, strict=False)), **kwargs})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.config.items())})"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides) -> Self:
        """Builds from a mapping, or from another object's `.config`, whose defaulted keys are left behind.

        `overrides` are the class's own keys. (The reference's configs list their defaulted keys in a private one.)
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, but is {config!r}")
        defaulted = config.get("_use_default_values", ())
        values = config.explicit() if isinstance(config, Config) else config
        values = {key: value for key, value in values.items() if key not in defaulted}
        cls.check_own(overrides)
        return cls(cls.Config.read({**values, **overrides}))

    @classmethod
    def check_own(cls, arguments: Mapping[str, Any]) -> None:
        """Arguments must be the class's own keys. (A file may hold others too, which are kept.)"""
        if unknown := arguments.keys() - cls.Config.known():
            known = ", ".join(sorted(cls.Config.known()))
            raise ConfigError(f"{cls.__name__} has no {min(unknown)}; its keys: {known}")


class Model(Configured, Switches, nn.Module, abstract=True):
    """A network with a config. It holds weights alone, and lives where and in what dtype its parameters do."""

    table: ClassVar[Table]  # the Hub's names of its tensors, and ours
    weights: ClassVar[str] = "diffusion_pytorch_model"  # the stem of its file of weights
    gradient_checkpointing = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.build(self.config)

    def build(self, c: Config) -> None:
        """Makes the modules."""
        raise NotImplementedError

    @classmethod
    def read_from(cls, folder: Path, files: Files) -> Self:
        file = folder / "config.json"
        values = read_json(file)
        if values.get("_class_name", cls.__name__) != cls.__name__:
            raise LoadError(f"{file}: _class_name={values['_class_name']!r}, but a {cls.__name__} is asked for")
        config = cls.Config.read(values, str(file))
        with torch.device("meta"):  # no memory, no random first weights
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.load_state_dict(read_weights(folder, files, cls.table, shapes, cls.__name__), assign=True)
        return model.eval()

    def write_to(self, folder: Path, variant: str | None) -> None:
        write_json(folder / "config.json", self.file_config())
        tensors = {self.table.hub(name): tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        write_tensors(tensors, folder / f"{self.weights}{f'.{variant}' if variant else ''}.safetensors")

    def file_config(self) -> dict[str, Any]:
        """What config.json says."""
        return {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION, **self.config}

    def enable_gradient_checkpointing(self) -> None:
        """Training then keeps the inputs of each level alone, and computes the rest again on the way back."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def through(self, block: nn.Module, *inputs: Any) -> Any:
        """What `block` makes of `inputs`, checkpointed where that is asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check_inputs(self, **inputs: torch.Tensor) -> None:
        """Raises a TypeError that names the first input that is no tensor, or not of the weights' dtype."""
        check_tensors(**inputs)
        for name, value in inputs.items():
            if value.dtype != self.dtype and not torch.is_autocast_enabled(value.device.type):
                raise TypeError(f"{name} is {value.dtype}, but this {type(self).__name__} is {self.dtype}: convert one")

    __repr__ = nn.Module.__repr__

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def check_tensors(**arguments) -> None:
    """Raises a TypeError that names the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, but is {value!r}")


def check_save(folder: str | os.PathLike, variant: str | None, safe_serialization: bool) -> None:
    check_path(folder, "save_directory", "a folder")
    check_variant(variant)
    if safe_serialization is not True:
        raise ValueError("safe_serialization must be True: minidiff reads pickles, and writes none")
