"""Configuration: JSON in, a frozen dataclass to read, JSON out.

Every model and scheduler declares its keys once, as a dataclass derived from `Config`. The type hints say what is
supported: numbers have their range there (`Annotated`), and a value that isn't in the hint is an error that names the
key. Keys that real checkpoints hold at one value alone stand apart, in `fixed`. Nothing is ignored in silence: a key
that nobody knows is an error too, unless `inert` lists it with the reason why it changes nothing.
"""

import json
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

MAX_JSON_BYTES = 8 * 2**20  # the largest of real models is a tokenizer of 3 MB


class ConfigError(ValueError):
    """A config has a key that isn't known, or a value that isn't supported. The message names file, key and value."""


class LoadError(OSError, ValueError):
    """A file of a model folder is missing, damaged or not supported. The message names it."""


class Range(NamedTuple):
    """The ends of a number's range, for a hint: `Annotated[int, Range(1, 100)]`."""

    least: float
    most: float


# A damaged file must not cost hours of building, or shapes that overflow: hence limits, far above real models.
Width = Annotated[int, Range(1, 2**20)]  # of channels, tokens, timesteps
Depth = Annotated[int, Range(1, 100)]  # of layers
Share = Annotated[float, Range(0, 1)]
MAX_LEVELS = 16  # of sizes in a UNet


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises LoadError, with the file's name, if it is anything else."""
    check_readable(file)
    if file.stat().st_size > MAX_JSON_BYTES:
        raise LoadError(f"{file}: larger than {MAX_JSON_BYTES} bytes, which no real config is")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises LoadError, which opens with `where`, if it is anything else."""
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise LoadError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(f"{where}: must hold an object, not {type(value).__name__}")
    return value


def check_readable(file: Path) -> None:
    """Raises LoadError, which says why, if a file can't be opened."""
    try:
        file.open("rb").close()
    except OSError as error:
        why = {FileNotFoundError: "no such file", PermissionError: "permission denied"}.get(type(error), str(error))
        if file.is_symlink() and not file.exists():
            why = f"a link to {os.readlink(file)}, which isn't there"
        raise LoadError(f"{file}: {why}") from None


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Config(Mapping):
    """Base of all configs: reads by attribute (`config.in_channels`) and as a mapping (`**config`).

    `fixed` are the keys that are known at one value alone: a value, or a `Literal` whose first one is the default.
    `given` are the keys that were named rather than defaulted: only those travel to a class with other defaults.
    `extra` are keys that another class reads; they are kept, so that swapping a scheduler back restores them.
    `version` is that of the library that wrote the file, if it says so: files from 2022 need mending.
    """

    fixed: ClassVar[Mapping[str, Any]] = {}
    inert: ClassVar[Mapping[str, str]] = {}
    given: ClassVar[frozenset[str]] = frozenset()
    extra: ClassVar[Mapping[str, Any]] = {}
    version: ClassVar[str] = ""

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
        where, version = where or cls.__name__, str(values.get("_diffusers_version", ""))
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        known = _hints(cls).keys()
        extra = {key: value for key, value in values.items() if key not in known}
        for key, value in extra.items():
            if key in cls.fixed:
                hint = _as_literal(cls.fixed[key])
                if not _matches(_tuples(value), hint):
                    raise ConfigError(f"{where}: {key}={value!r} is not supported; supported: {_describe(hint)}")
            elif not cls.is_inert(key):
                supported = ", ".join(sorted(cls.known()))
                raise ConfigError(f"{where}: unknown key {key}={value!r}; supported keys: {supported}")
        given = {key: value for key, value in values.items() if key in known}
        try:
            config = cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        object.__setattr__(config, "given", frozenset(given))
        object.__setattr__(config, "extra", extra)
        object.__setattr__(config, "version", version)
        return config

    @classmethod
    def known(cls) -> set[str]:
        """The keys of this class, those with one value among them."""
        return {*_hints(cls), *cls.fixed}

    @classmethod
    def is_inert(cls, key: str) -> bool:
        """Whether `key`, which this class doesn't have, may stand in its file all the same."""
        return key in cls.inert

    def explicit(self) -> dict[str, Any]:
        """The keys that were named when this config was made, without the defaults."""
        return {key: value for key, value in self.items() if key in self.given or key in self.extra}

    def require(self, condition: bool, key: str, must: str) -> None:
        """Raises a ConfigError for `key` unless `condition` holds. For checks that a type hint can't express."""
        if not condition:
            raise ConfigError(f"{key}={self[key]!r} is not supported: it must {must}")

    def __getitem__(self, key: str) -> Any:
        if key in self.extra:
            return self.extra[key]
        if key in _hints(type(self)):
            return getattr(self, key)
        if key in self.fixed:
            return get_args(_as_literal(self.fixed[key]))[0]
        raise KeyError(key)

    def __getattr__(self, key: str) -> Any:  # called only for names that aren't fields
        if key in self.extra or key in self.fixed:
            return self[key]
        raise AttributeError(f"{type(self).__name__} has no key {key!r}; its keys: {', '.join(sorted(self))}")

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*_hints(type(self)), *self.fixed, *self.extra))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _as_literal(value: Any) -> Any:
    """What `fixed` says of a key, as a hint."""
    return value if get_origin(value) is Literal else Literal[value]


@cache
def _hints(cls: type[Config]) -> dict[str, Any]:
    """The keys of a config class with their hints, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _tuples(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and torch's numbers and arrays
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _matches(value: Any, hint: Any) -> bool:
    """Whether `value` is one that the type hint allows. An int passes as float; a bool never passes as a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in args)
    if origin is Annotated:
        kind, (least, most) = args
        return _matches(value, kind) and least <= value <= most
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
        return ", ".join("null" if option is None else repr(option) for option in args)
    if origin is Annotated:
        return f"{_describe(args[0])} in {args[1].least}..{args[1].most}"
    if origin in (Union, types.UnionType):
        return ", ".join(map(_describe, args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    return "null" if hint in (None, types.NoneType) else hint.__name__
