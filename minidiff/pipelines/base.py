"""DiffusionPipeline: what all systems of models and a scheduler share. Folders in and out, device and dtype."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Self, get_type_hints

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
from ..loading.weights import which_files
from ..outputs import output
from .memory import MemorySwitches
from .run import Runs

PIPELINES: dict[str, type["DiffusionPipeline"]] = {}  # by class name; each enters by being defined

MISSING = {  # of the reference's pipelines: what to do instead
    "enable_freeu": "minidiff has no FreeU; the UNet's up blocks, where it scales the skips, are in models/unet.py",
    "fuse_qkv_projections": "nothing needs it: leave it out",
    "load_ip_adapter": "minidiff has no IP-Adapter",
    "upcast_vae": "give the VAE a dtype of its own: pipe.vae.to(torch.float32)",
}

# Parts of real folders that a picture doesn't depend on and that aren't written yet
LEFT_OUT = {
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil"),
}


@output
class ImageOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says."""

    images: list[Image.Image] | np.ndarray | Tensor


class DiffusionPipeline(Runs, MemorySwitches, Pushable):
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
                raise TypeError(f"{name} must be a {kinds[name].__name__}, but is {component!r:.100}")
            setattr(self, name, component)

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
        files, device = which_files(dtype or torch_dtype, variant, use_safetensors), one_device(device_map)
        hub = {name: keywords.pop(name) for name in DOWNLOADS if name in keywords}
        given = {name: value for name, value in keywords.items() if name not in LOADING}

        def wanted(names: list[str]) -> list[str]:
            return wanted_by_pipeline(names, files, {*given, *LEFT_OUT})

        folder = fetch(pretrained_model_name_or_path, wanted, INDEX, **hub)
        index_file = folder / INDEX
        with reading(folder):
            if cls is DiffusionPipeline:
                cls = _class_named(read_json(index_file).get("_class_name"), str(index_file))
            parameters = inspect.signature(cls).parameters
            arguments = ("torch_dtype", "dtype", "variant", "use_safetensors", "device_map", *DOWNLOADS)
            check_keywords(keywords, LOADING, cls.__name__, (*parameters, *arguments))
            left_out = {kind for kinds in LEFT_OUT.values() for kind in kinds}
            found = load_components(index_file, given, files, tuple(parameters), cls.setting_names, left_out)
        found |= given
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        if missing := [name for name in required if found.get(name) is None]:
            raise LoadError(f"{index_file}: doesn't name {', '.join(missing)}, which {cls.__name__} needs")
        pipe = cls(**found)
        return pipe.to(device) if device else pipe

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
        """Where the models compute, which isn't where they are while they are offloaded."""
        return self._offload_device or self.device

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
        near = difflib.get_close_matches(name, dir(type(self)), n=1)
        hint = MISSING.get(name) or (f"did you mean {near[0]}?" if near else f"it has {', '.join(self._names)}")
        raise AttributeError(f"{type(self).__name__} has no {name!r}: {hint}")

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


def _serves_as(component: Any, kind: type) -> bool:
    """One of minidiff's own classes must be `kind`; what others wrote (a wrapped model, say) must only look like it."""
    if isinstance(component, kind | Component | type | None):
        return isinstance(component, kind)
    looks = callable(component) or hasattr(component, "step")
    return looks and isinstance(component, nn.Module) == issubclass(kind, nn.Module)


def _class_named(name: Any, where: str) -> type[DiffusionPipeline]:
    if not isinstance(name, str) or name not in PIPELINES:
        raise LoadError(f"{where}: _class_name={name!r} is not supported; supported: {', '.join(sorted(PIPELINES))}")
    return PIPELINES[name]
