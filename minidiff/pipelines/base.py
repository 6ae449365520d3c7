"""DiffusionPipeline: what all systems of models and a scheduler share. Folders in and out, device and dtype."""

import copy
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Self, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..loading.component import Component
from ..loading.config import LoadError, read_json
from ..loading.folder import load_components, save_components, wanted_by_pipeline
from ..loading.hub import fetch
from ..loading.weights import which_files
from ..outputs import output

PIPELINES: dict[str, type["DiffusionPipeline"]] = {}  # by class name; each enters by being defined

# Parts of real folders that a picture doesn't depend on and that aren't written yet
LEFT_OUT = {
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil"),
}


@output
class ImageOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says."""

    images: list[Image.Image] | np.ndarray | Tensor


class DiffusionPipeline:
    """Base of the pipelines. A subclass's `__init__` names its components, and hands them to `register_modules`.

    `setting_names` are the arguments of `__init__`, kept as attributes, that are no components: flags, numbers.
    """

    setting_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        PIPELINES[cls.__name__] = cls

    def register_modules(self, **components: Any) -> None:
        """Keeps the components as attributes; `components` and `save_pretrained` know them by these names.

        Raises TypeError for a component of another kind than the subclass's `__init__` is annotated with.
        """
        self._names = tuple(components)
        self._progress_bar_config: dict[str, Any] = {}
        self._runs: list[Self] = []  # the views of calls in progress
        self._stopped = False
        self._offload_device: torch.device | None = None
        self._guidance_scale, self._guidance_rescale, self._clip_skip, self._num_timesteps = 0.0, 0.0, None, 0
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
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **components: Any,
    ) -> Self:
        """The pipeline in a folder or Hub repository. `DiffusionPipeline` itself picks the class that the folder names.

        `components` given by name are taken instead of the folder's (`unet=my_unet`, `safety_checker=None`); they
        aren't read or downloaded. The other arguments are those of `minidiff.loading.load_component`.

        Raises LoadError for a missing or damaged file, ConfigError for a key or value in one that isn't supported,
        TypeError for the name of a component that the pipeline doesn't have.
        """
        files = which_files(dtype or torch_dtype, variant, use_safetensors)

        def wanted(names: list[str]) -> list[str]:
            return wanted_by_pipeline(names, files, {*components, *LEFT_OUT})

        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = fetch(pretrained_model_name_or_path, wanted, "model_index.json", **hub)
        index_file = folder / "model_index.json"
        if cls is DiffusionPipeline:
            cls = _class_named(read_json(index_file).get("_class_name"), str(index_file))
        parameters = inspect.signature(cls).parameters
        if unknown := components.keys() - parameters.keys():
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}")
        left_out = {kind for kinds in LEFT_OUT.values() for kind in kinds}
        found = load_components(index_file, components, files, tuple(parameters), cls.setting_names, left_out)
        found |= components
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        if missing := [name for name in required if found.get(name) is None]:
            raise LoadError(f"{index_file}: doesn't name {', '.join(missing)}, which {cls.__name__} needs")
        return cls(**found)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, variant: str | None = None, safe_serialization: bool = True
    ) -> None:
        """Writes a folder that this and the reference's `from_pretrained` load. Other files in it stay.

        The folder holds the whole pipeline afterwards, or, if anything fails on the way, what it held before.
        """
        options = {"variant": variant, "safe_serialization": safe_serialization}
        settings = {name: getattr(self, name) for name in self.setting_names}
        save_components(self.components, settings, type(self).__name__, save_directory, **options)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and converts the models, as `torch.nn.Module.to`: `to("cuda")`, `to("cuda", torch.float16)`."""
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

    # One call of the pipeline

    @contextmanager
    def running(self, **settings: Any) -> Iterator[Self]:
        """A call's own view of the pipeline: the same components, but a scheduler state, guidance and interruption of
        its own. So two threads may share a pipeline, a callback changes this run alone, and a run that fails leaves
        nothing behind. What the run was told (`_guidance_scale`, ...) and the scheduler's state are the pipeline's
        when it is done.
        """
        run = copy.copy(self)  # without `_runs`
        scheduler = self.scheduler
        run.scheduler = copy.copy(scheduler)
        run._stopped = False
        vars(run).update({f"_{name}": value for name, value in settings.items()})
        if not self._runs:
            self._stopped = False
        self._runs.append(run)
        try:
            yield run
        finally:
            self._runs.remove(run)
        vars(scheduler).update(vars(run.scheduler))
        vars(self).update({f"_{name}": getattr(run, f"_{name}") for name in (*settings, "num_timesteps")})

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_runs": []}

    @property
    def _interrupt(self) -> bool:
        """Set it, from a callback or another thread, and the run stops after the present step. On the pipeline itself
        it stops all its runs."""
        return self._stopped

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._stopped = bool(value)
        for run in self._runs:
            run._interrupt = value

    @property
    def interrupt(self) -> bool:
        return self._stopped

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def num_timesteps(self) -> int:
        """Of the present or the last run."""
        return self._num_timesteps

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

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


def _serves_as(component: Any, kind: type) -> bool:
    """One of minidiff's own classes must be `kind`; what others wrote (a wrapped model, say) must only look like it."""
    if isinstance(component, kind | Component | type | None):
        return isinstance(component, kind)
    looks = callable(component) or hasattr(component, "step")
    return looks and isinstance(component, nn.Module) == issubclass(kind, nn.Module)


def _class_named(name: Any, where: str) -> type[DiffusionPipeline]:
    if name not in PIPELINES:
        raise LoadError(f"{where}: _class_name={name!r} is not supported; supported: {', '.join(sorted(PIPELINES))}")
    return PIPELINES[name]
