"""DiffusionPipeline: what all systems of models and a scheduler share. Folders in and out, device and dtype."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, get_args, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..loading.arguments import DOWNLOADS, LOADING, SAVING, check_keywords, one_device
from ..loading.component import Component
from ..loading.config import LoadError, read_json
from ..loading.folder import load_components, save_components, wanted_by_pipeline
from ..loading.hub import fetch
from ..loading.push import Pushable
from ..loading.save import INDEX, reading
from ..loading.weights import one_dtype, which_files
from ..missing import Explains, no_attribute
from ..outputs import output
from .memory import MemorySwitches, device_of
from .run import Runs
from .single_file import SingleFiles

PIPELINES: dict[str, type["DiffusionPipeline"]] = {}  # by class name; each enters by being defined


@output
class ImageOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says."""

    images: list[Image.Image] | np.ndarray | Tensor


class DiffusionPipeline(Runs, MemorySwitches, SingleFiles, Pushable, metaclass=Explains):
    """Base of the pipelines. A subclass's `__init__` names its components, and hands them to `register_modules`.

    `setting_names` are the arguments of `__init__`, kept as attributes, that are no components: flags, numbers.
    """

    setting_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        PIPELINES[cls.__name__] = cls
        for name in {"__init__", "__call__"} & vars(cls).keys():
            setattr(cls, name, _explained(vars(cls)[name], cls.__name__))

    def register_modules(self, **components: Any) -> None:
        """Keeps the components as attributes; `components` and `save_pretrained` know them by these names.

        Raises TypeError for a component of another kind than the subclass's `__init__` is annotated with.
        """
        self._names = tuple(components)
        self._progress_bar_config: dict[str, Any] = {}
        self._runs: list[Self] = []  # the views of calls in progress
        kinds = get_type_hints(type(self).__init__)
        for name, component in components.items():
            if not _serves_as(component, kinds[name]):
                wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in _classes(kinds[name]))
                raise TypeError(f"{name} must be a {wanted}, but is {component!r:.100}")
            setattr(self, name, component)

    @classmethod
    def required(cls) -> dict[str, bool]:
        """Arguments of `__init__` without a default, and whether they can't be None: XL's refiner has fewer parts."""
        hints, parameters = get_type_hints(cls.__init__), inspect.signature(cls).parameters.values()
        return {p.name: not isinstance(None, hints[p.name]) for p in parameters if p.default is p.empty}

    @classmethod
    def missing(cls, found: Mapping[str, Any]) -> str:
        """The names of what `found` must hold and doesn't."""
        return ", ".join(name for name, needed in cls.required().items() if needed and found[name] is None)

    @classmethod
    def settings(cls) -> dict[str, type]:
        """The kinds of the settings, by name."""
        hints = get_type_hints(cls.__init__)
        return {name: hints[name] for name in cls.setting_names}

    @property
    def components(self) -> dict[str, Any]:
        """All components by name. `OtherPipeline(**pipe.components)` shares them, without a copy."""
        return {name: getattr(self, name) for name in self._names}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | torch.device | None = None,
        **keywords: Any,
    ) -> Self:
        """The pipeline in a folder or Hub repository. `DiffusionPipeline` itself picks the class that the folder names.

        Components given by name are taken instead of the folder's (`unet=my_unet`, `safety_checker=None`); they
        aren't read or downloaded. The other arguments are those of a component's `from_pretrained`.

        Raises LoadError for a missing or damaged file, ConfigError for a key or value in one that isn't supported,
        TypeError for an argument that is neither known nor a component of the pipeline.
        """
        files, device = which_files(one_dtype(dtype, torch_dtype), variant, use_safetensors), one_device(device_map)
        hub = {name: keywords.pop(name) for name in DOWNLOADS if name in keywords}
        given = {name: value for name, value in keywords.items() if name not in LOADING}

        def wanted(names: list[str]) -> list[str]:
            return wanted_by_pipeline(names, files, given)

        folder = fetch(pretrained_model_name_or_path, wanted, INDEX, **hub)
        index_file = folder / INDEX
        with reading(folder):
            cls = cls.class_for(index_file)
            parameters = inspect.signature(cls).parameters
            arguments = ("torch_dtype", "dtype", "variant", "use_safetensors", "device_map", *DOWNLOADS)
            check_keywords(keywords, LOADING, cls.__name__, (*parameters, *arguments))
            found = load_components(index_file, given, files, tuple(parameters), cls.settings())
        pipe = cls.made_of(found, given, index_file)
        return pipe.to(device) if device else pipe

    @classmethod
    def class_for(cls, index_file: Path) -> type[Self]:
        """This class; for `DiffusionPipeline` itself, which is none, the one that `model_index.json` names."""
        if cls is not DiffusionPipeline:
            return cls
        return _class_named(read_json(index_file).get("_class_name"), str(index_file))

    @classmethod
    def made_of(cls, found: Mapping[str, Any], given: Mapping[str, Any], index_file: Path) -> Self:
        """The pipeline of loaded parts and `given` ones. Raises ValueError for a None, LoadError where one lacks."""
        if refused := cls.missing(dict.fromkeys(cls.required(), "") | given):
            raise ValueError(f"None was given for {refused}, which {cls.__name__} needs")
        found = dict.fromkeys(cls.required()) | found | given
        if missing := cls.missing(found):
            raise LoadError(f"{index_file}: doesn't name {missing}, which {cls.__name__} needs")
        return cls(**found)

    @classmethod
    def from_pipe(
        cls,
        pipeline: "DiffusionPipeline",
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **given: Any,
    ) -> Self:
        """This pipeline with the components and settings of another one: shared, no copy. `given` go before them.

        A `dtype` converts the models, which the other pipeline has too. (The reference converts to float32 without.)

        Raises TypeError for what the pipeline doesn't have, ValueError for what it needs and the other hasn't.
        """
        parameters = inspect.signature(cls).parameters
        if unknown := given.keys() - parameters.keys():
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}")
        settings = {name: getattr(pipeline, name) for name in pipeline.setting_names}
        found = {name: part for name, part in (pipeline.components | settings).items() if name in parameters} | given
        found = dict.fromkeys(cls.required()) | found
        if missing := cls.missing(found):
            raise ValueError(f"a {type(pipeline).__name__} has no {missing}, which {cls.__name__} needs")
        made = cls(**found)
        made._hooks, made._offload_device = pipeline._hooks, pipeline._offload_device
        return made.to(dtype or torch_dtype) if dtype or torch_dtype else made

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        variant: str | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
        **keywords: Any,
    ) -> None:
        """Writes a folder that this and the reference's `from_pretrained` load. Other files in it stay.

        The folder holds the whole pipeline afterwards, or, if anything fails on the way, what it held before. Weights
        larger than `max_shard_size` (bytes, or "5GB"; "10GB" if None) are written in shards.
        """
        options = {"variant": variant, "safe_serialization": safe_serialization, "max_shard_size": max_shard_size}
        check_keywords(keywords, SAVING, type(self).__name__, ("save_directory", *options))
        settings = {name: getattr(self, name) for name in self.setting_names}
        save_components(self.components, settings, type(self).__name__, save_directory, **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and converts the models, as `torch.nn.Module.to`: `to("cuda")`, `to("cuda", torch.float16)`."""
        if self._offload_device is not None:
            raise ValueError("to() can't move models that are offloaded: call remove_all_hooks first")
        for model in self._models():
            model.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        return next((model.device for model in self._models()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next((model.dtype for model in self._models()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        """Where the loop runs: the UNet's device. Other components may have devices of their own."""
        return device_of(self.unet)

    def _models(self) -> list[nn.Module]:
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    @property
    def config(self) -> dict[str, Any]:
        """What model_index.json says: [library, class] of each component, and the settings."""
        parts = {name: _describe(part) for name, part in self.components.items()}
        return {
            "_class_name": type(self).__name__,
            **parts,
            **{name: getattr(self, name) for name in self.setting_names},
        }

    def __getattr__(self, name: str) -> Any:  # called only for what isn't there
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(no_attribute(type(self).__name__, name, dir(self)))

    def __repr__(self) -> str:
        parts = [
            f"  {name}: {'None' if part is None else type(part).__name__}" for name, part in self.components.items()
        ]
        return "\n".join([f"{type(self).__name__} on {self.device}, {str(self.dtype).removeprefix('torch.')}", *parts])

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments for tqdm: `disable=True` hides the bar."""
        self._progress_bar_config = kwargs

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> tqdm:
        return tqdm(iterable, total=total, **self._progress_bar_config)


def _explained(function: Callable, owner: str) -> Callable:
    """`function`, which says what it takes where its arguments don't fit. Python would only say that they don't."""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in names]
            near = difflib.get_close_matches(unknown[0], names, n=1) if unknown else []
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
            raise TypeError(f"{owner} {error}: {hint}") from None
        return function(*args, **kwargs)

    return checked


def _describe(part: Any) -> list[str | None]:
    """A component's library and class."""
    if part is None:
        return [None, None]
    return [getattr(part, "library", type(part).__module__.split(".")[0]), type(part).__name__]


def _serves_as(component: Any, kind: Any) -> bool:
    """One of minidiff's own classes must be `kind`, a class or a union of some; what others wrote (a wrapped model,
    say) must only look like it."""
    if isinstance(component, kind | Component | type | None):
        return isinstance(component, kind)
    looks = callable(component) or hasattr(component, "step")
    return looks and isinstance(component, nn.Module) == any(issubclass(one, nn.Module) for one in _classes(kind))


def _classes(kind: Any) -> tuple[type, ...]:
    """Those of a hint, without None."""
    return tuple(one for one in get_args(kind) or (kind,) if one is not type(None))


def _class_named(name: Any, where: str) -> type[DiffusionPipeline]:
    if not isinstance(name, str) or name not in PIPELINES:
        raise LoadError(f"{where}: _class_name={name!r} is not supported; supported: {', '.join(sorted(PIPELINES))}")
    return PIPELINES[name]
