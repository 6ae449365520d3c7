"""Configuration: JSON in, a frozen dataclass to read, JSON out.

Every model and scheduler declares its keys once, as a dataclass derived from `Config`. The type hints say what is
supported: a key that exists only at one value in real checkpoints is a `Literal` of that value, and any other value is
an error that names the key. Nothing is ignored in silence: a key that the dataclass doesn't have is an error too,
unless `inert` lists it with the reason why it changes nothing.
"""

import inspect
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn


class ConfigError(ValueError):
    """A config has a key that isn't known, or a value that isn't supported. The message names file, key and value."""


class LoadError(OSError, ValueError):
    """A file of a model folder is missing, damaged or not supported. The message names it."""


MAX_WIDTH, MAX_DEPTH, MAX_LEVELS = 2**20, 100, 16  # of channels, tokens, timesteps; of layers; of sizes in a UNet
MAX_JSON_BYTES = 8 * 2**20  # the largest of real models is a tokenizer of 3 MB


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises LoadError, with the file's name, if it is anything else."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise LoadError(f"{file}: larger than {MAX_JSON_BYTES} bytes, which no real config is")
        value = json.loads(file.read_text(encoding="utf-8"))
    except LoadError:
        raise
    except FileNotFoundError:
        raise LoadError(f"{file}: no such file") from None
    except OSError as error:
        raise LoadError(f"{file}: can't be read: {error}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise LoadError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{file}: must hold an object, not {type(value).__name__}")
    return value


@dataclass(frozen=True, eq=False)
class Config(Mapping):
    """Base of all configs: reads by attribute (`config.in_channels`) and as a mapping (`**config`).

    `given` are the keys that were named rather than defaulted: only those travel to a class with other defaults.
    `extra` are keys that another class reads; they are kept, so that swapping a scheduler back restores them.
    """

    inert: ClassVar[Mapping[str, str]] = {}
    given: ClassVar[frozenset[str]] = frozenset()
    extra: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self):
        for key, hint in _hints(type(self)).items():
            value = _tuples(getattr(self, key))
            if not _matches(value, hint):
                raise ConfigError(f"{key}={value!r} is not supported; supported: {_describe(hint)}")
            object.__setattr__(self, key, value)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str | None = None) -> Self:
        """Checks `values` and builds the config. `where` (a file, usually) opens the message of any ConfigError.

        Keys that start with an underscore describe the file rather than the object and are left out.
        """
        where = where or cls.__name__
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        known = {field.name for field in fields(cls)}
        extra = {key: value for key, value in values.items() if key not in known}
        for key, value in extra.items():
            if key not in cls.inert:
                raise ConfigError(f"{where}: unknown key {key}={value!r}; supported keys: {', '.join(sorted(known))}")
        given = {key: value for key, value in values.items() if key in known}
        try:
            config = cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        object.__setattr__(config, "given", frozenset(given))
        object.__setattr__(config, "extra", extra)
        return config

    def explicit(self) -> dict[str, Any]:
        """The keys that were named when this config was made, without the defaults."""
        return {key: value for key, value in self.items() if key in self.given or key in self.extra}

    def require(self, condition: bool, key: str, must: str) -> None:
        """Raises a ConfigError for `key` unless `condition` holds. For checks that a type hint can't express."""
        if not condition:
            raise ConfigError(f"{key}={self[key]!r} is not supported: it must {must}")

    def require_within(self, most: int, *keys: str) -> None:
        """Raises a ConfigError for the first of `keys` whose number, or one of its numbers, is not in 1..most.

        A damaged file must not cost hours of building, or shapes that overflow: hence limits, far above real models.
        """
        for key in keys:
            values = self[key] if isinstance(self[key], tuple) else (self[key],)
            self.require(all(1 <= value <= most for value in values), key, f"lie in 1..{most}")

    def __getitem__(self, key: str) -> Any:
        if key in self.extra:
            return self.extra[key]
        if key not in (field.name for field in fields(self)):
            raise KeyError(key)
        return getattr(self, key)

    def __getattr__(self, key: str) -> Any:  # called only for names that aren't fields
        if key in self.extra:
            return self.extra[key]
        raise AttributeError(f"{type(self).__name__} has no key {key!r}")

    def __iter__(self) -> Iterator[str]:
        yield from (field.name for field in fields(self))
        yield from self.extra

    def __len__(self) -> int:
        return len(fields(self)) + len(self.extra)


class Configured:
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
        else:
            self.config = self.Config.read(inspect.signature(self.Config).bind(*args, **kwargs).arguments)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides) -> Self:
        """Builds from a mapping, or from another object's `.config`, whose defaulted keys are left behind.

        `overrides` are the class's own keys. (The reference's configs list their defaulted keys in a private one.)
        """
        inspect.signature(cls.Config).bind_partial(**overrides)
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, but is {config!r}")
        defaulted = config.get("_use_default_values", ())
        values = config.explicit() if isinstance(config, Config) else config
        values = {key: value for key, value in values.items() if key not in defaulted}
        return cls(cls.Config.read({**values, **overrides}))

    @classmethod
    def from_pretrained(cls, path: str, *, subfolder: str | None = None, **options) -> Self:
        """Loads from a folder or Hub id; `options` are those of `minidiff.loading.load_component`."""
        from .loading import load_component

        return load_component(cls, path, subfolder=subfolder, **options)

    def save_pretrained(self, folder: str, **options) -> None:
        """Writes config and weights in the Hub's layout; `options` are those of `minidiff.loading.save_component`."""
        from .loading import save_component

        save_component(self, folder, **options)


def check_tensors(**arguments) -> None:
    """Raises a TypeError that names the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, but is {value!r}")


class Model(Configured, nn.Module):
    """A network with a config. It holds weights alone, and lives where and in what dtype its parameters do."""

    def check_inputs(self, **inputs: torch.Tensor) -> None:
        """Raises a TypeError that names the first input that is no tensor, or not of the weights' dtype."""
        check_tensors(**inputs)
        for name, value in inputs.items():
            if value.dtype != self.dtype and not torch.is_autocast_enabled(value.device.type):
                raise TypeError(f"{name} is {value.dtype}, but this {type(self).__name__} is {self.dtype}: convert one")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _hints(cls: type[Config]) -> dict[str, Any]:
    return {key: hint for key, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}


def _tuples(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and torch's numbers and arrays
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _matches(value: Any, hint: Any) -> bool:
    """Whether `value` is one that the type hint allows. An int passes as float; a bool never passes as a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in args)
    if origin in (Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is tuple:  # tuple[x, ...]
        return isinstance(value, tuple) and all(_matches(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, types.NoneType if hint is None else hint)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return ", ".join(map(_describe, args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    return "null" if hint in (None, types.NoneType) else hint.__name__
