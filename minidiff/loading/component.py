"""The base of everything that a folder holds: models, schedulers, tokenizers. A class enters the registry by being
defined, and says of itself what loading must know, so that loading knows no class by name.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ..missing import Explains
from .arguments import DOWNLOADS, LOADING, SAVING, check_keywords, one_device
from .config import Config, ConfigError, read_json, write_json
from .hub import check_path, fetch
from .push import Pushable
from .save import reading, replacing
from .weights import Files, check_variant, one_dtype, replaced, wanted, which_files

FORMAT_VERSION = "0.42.0"  # of diffusers, whose folder layout this is

SAVES = ("save_directory", "variant", "safe_serialization", "max_shard_size", "is_main_process")

REGISTRY: dict[str, type["Component"]] = {}  # by the class names that folders give


class Component(Pushable, metaclass=Explains):
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

    @classmethod
    def read_with(cls, folder: Path, files: Files, overrides: Mapping[str, Any]) -> Self:
        """The same with some of its config's keys given."""
        return cls.read_from(folder, files)

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys of its config that `from_pretrained` takes."""
        return []

    def write_to(self, folder: Path, files: Files) -> None:
        """Writes the object's files into an empty folder."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Self:
        """Loads one model, scheduler or tokenizer from a folder or Hub repository, or from a `subfolder` of it.

        `dtype` (`torch_dtype` is its older name): of the weights; float32 if None, whatever the files hold; "auto" is
        theirs. `variant`: of the files, such as "fp16". `use_safetensors`: True takes no pickles, False only pickles;
        None prefers safetensors. `device_map`: the device to go to; "auto" and "balanced" are the one there is.
        Keywords: huggingface_hub's `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`; keys of a
        model's or scheduler's config, which then take the place of the file's. The reference's others are taken where
        they mean nothing here.

        Raises LoadError for a missing or damaged file, ConfigError for a key or value that isn't supported, TypeError
        for an unknown argument, ValueError for a value that isn't supported.
        """
        files, device = which_files(one_dtype(dtype, torch_dtype), variant, use_safetensors), one_device(device_map)
        own = [key for key in cls.own_keys() if key not in DOWNLOADS]
        known = ("subfolder", "torch_dtype", "dtype", "variant", "use_safetensors", "device_map", *DOWNLOADS)
        taken = check_keywords(keywords, LOADING, cls.__name__, (*known, *own))
        overrides = {key: taken.pop(key) for key in own if key in taken}
        first = f"{subfolder}/*config.json" if subfolder else "*config.json"

        def names(all_names: list[str]) -> list[str]:
            return wanted(all_names, subfolder or "", files, cls.files)

        folder = fetch(pretrained_model_name_or_path, names, first, **taken) / (subfolder or "")
        with reading(folder):
            found = cls.read_with(folder, files, overrides)
        return found.to(device) if device and isinstance(found, torch.nn.Module) else found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        variant: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "10GB",
        is_main_process: bool = True,
        **keywords: Any,
    ) -> None:
        """Writes the Hub's layout to `save_directory`, which afterwards holds all of it or is as it was.

        Weights larger than `max_shard_size` (bytes, or "5GB") are written in shards. Processes that aren't the main
        one of a distributed run write nothing.
        """
        files = check_save(save_directory, variant, safe_serialization, max_shard_size)
        check_keywords(keywords, SAVING, type(self).__name__, SAVES)
        if is_main_process:
            with replacing(Path(save_directory), {"": lambda old: self.replaced(old, files)}) as stages:
                self.write_to(stages[""], files)

    def parts(self, folder: Path) -> dict[Path, "Component"]:
        """By folder, what a pipeline saves of it there: as a rule itself. (Several nets have a folder each.)"""
        return {folder: self}

    @classmethod
    def replaced(cls, folder: Path, files: Files) -> set[str]:
        """The files in a component's folder that end with a save."""
        return replaced(folder, files, cls.files)


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
    def own_keys(cls) -> list[str]:
        return [*cls.Config.known()]

    @classmethod
    def read_with(cls, folder: Path, files: Files, overrides: Mapping[str, Any]) -> Self:
        found = cls.read_from(folder, files)
        return cls.from_config(found.config, **overrides) if overrides else found

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
    def read_from(cls, folder: Path, files: Files) -> Self:
        file = folder / cls.files[0]
        return cls(cls.Config.read(read_json(file), str(file)))

    def write_to(self, folder: Path, files: Files) -> None:
        write_json(folder / self.files[0], self.file_config())

    def file_config(self) -> dict[str, Any]:
        """What its config's file says."""
        return {**self.config, **self.header()}

    def header(self) -> dict[str, Any]:
        """What the file says of itself."""
        return {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Writes the config's file alone, without any weights."""
        check_path(save_directory, "save_directory", "a folder")
        with replacing(Path(save_directory), {"": lambda old: {self.files[0]}}) as stages:
            write_json(stages[""] / self.files[0], self.file_config())

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **keywords: Any
    ) -> dict[str, Any]:
        """What the config's file in a folder or Hub repository says, for `from_config`; unchecked."""
        taken = check_keywords(keywords, LOADING, cls.__name__, ("subfolder", *DOWNLOADS))
        name = f"{subfolder}/{cls.files[0]}" if subfolder else cls.files[0]
        folder = fetch(pretrained_model_name_or_path, lambda names: [name], name, **taken)
        with reading(folder):
            return read_json(folder / name)

    @classmethod
    def check_own(cls, arguments: Mapping[str, Any]) -> None:
        """Arguments must be the class's own keys. (A file may hold others too, which are kept.)"""
        if unknown := arguments.keys() - cls.Config.known():
            known = ", ".join(sorted(cls.Config.known()))
            raise ConfigError(f"{cls.__name__} has no {min(unknown)}; its keys: {known}")


def check_save(
    folder: str | os.PathLike, variant: str | None, safe_serialization: bool, max_shard_size: int | str
) -> Files:
    """Checks the arguments of a `save_pretrained`. Raises TypeError or ValueError, which names the one."""
    check_path(folder, "save_directory", "a folder")
    check_variant(variant)
    if safe_serialization is not True:
        raise ValueError("safe_serialization must be True: minidiff reads pickles, and writes none")
    digits = re.fullmatch(r"[1-9][0-9]*(KB|MB|GB|TB)?", str(max_shard_size))
    if isinstance(max_shard_size, bool) or not digits:
        raise ValueError(f'max_shard_size must be a number of bytes or a text such as "5GB", not {max_shard_size!r}')
    return Files(variant=variant, max_shard_size=int(max_shard_size) if digits[1] is None else max_shard_size)
