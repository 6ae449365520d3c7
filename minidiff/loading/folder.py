"""A pipeline's folder: `model_index.json`, which names each component's class, and a folder for each component.

model_index.json                            "unet": ["diffusers", "UNet2DConditionModel"], ...
unet/config.json                            the keys of the constructor
unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
tokenizer/vocab.json, merges.txt, ...
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from torch.nn import Module

from .component import FORMAT_VERSION, REGISTRY, Component, check_save
from .config import LoadError, read_json, write_json
from .save import INDEX, replacing
from .weights import Files, find_weights, wanted


def wanted_by_pipeline(names: list[str], files: Files, given: Collection[str]) -> list[str]:
    """Of all files of a repository, those that loading its pipeline will read. Components `given` aren't."""
    small = {file for cls in REGISTRY.values() for file in cls.files}
    folders = {name.split("/")[0] for name in names if name.count("/") == 1} - set(given)
    folders |= {""} if "config.json" in names else set()
    return [INDEX, *(file for folder in sorted(folders) for file in wanted(names, folder, files, small))]


def load_components(
    index_file: Path,
    given: Mapping[str, Any],
    files: Files,
    expected: Collection[str],
    settings: Mapping[str, type],
    read: Callable[[type[Component], Path, Files], Component] = lambda cls, folder, files: cls.read_from(folder, files),
) -> dict[str, Any]:
    """What `model_index.json` names: components, and `settings` (their types by name), which stand there as they are.

    Those `given` aren't read; `read` reads one. Raises LoadError for a name that isn't `expected`, and for an unknown
    class.
    """
    components: dict[str, Any] = {}
    to_read: dict[str, type[Component]] = {}
    for name, spec in read_json(index_file).items():
        if name.startswith("_") or name in given:
            continue
        if name not in expected:
            if spec == [None, None]:  # a part that newer pipelines of this name can have, and this one hasn't
                continue
            raise LoadError(f"{index_file}: {name} is not supported; supported: {', '.join(expected)}")
        if name in settings:
            kinds = get_args(settings[name]) or (settings[name],)  # of `bool | None`, say
            if type(spec) not in (*kinds, NoneType):
                must = "true or false" if kinds[0] is bool else f"a {kinds[0].__name__}"
                raise LoadError(f"{index_file}: {name}={spec!r} must be {must}")
            components[name] = spec
        elif spec == [None, None]:
            components[name] = None
        elif not isinstance(spec, list) or len(spec) != 2 or not all(isinstance(part, str) for part in spec):
            raise LoadError(f"{index_file}: {name}={spec!r} must be [library, class] or [null, null]")
        elif spec[1] not in REGISTRY:
            supported = ", ".join(sorted(REGISTRY))
            raise LoadError(
                f"{index_file}: {name} has the unknown class {spec[1]!r}; supported: {supported}. What {spec[0]} loads"
                f" can be given: from_pretrained(..., {name}=...)"
            )
        else:
            to_read[name] = REGISTRY[spec[1]]
    root = index_file.parent
    at_root = (root / "config.json").exists()  # the DDPM paper's own repositories have no folder for each component
    nested = {name for name, cls in to_read.items() if any((root / name / file).exists() for file in cls.files)}
    folders = {name: root if at_root and name not in nested else root / name for name in to_read}
    models = [name for name, cls in to_read.items() if issubclass(cls, Module)]
    if len(flat := [name for name in models if folders[name] == root]) > 1:
        raise LoadError(
            f"{root}: {', '.join(flat)} have no folders: config.json beside {INDEX} can be one model's alone"
        )
    if files.variant and models and not any(find_weights(folders[name], files) for name in models):
        raise LoadError(f"{root}: no component has weights of the variant {files.variant!r}")
    for name, cls in to_read.items():
        folder, chosen = folders[name], files
        if files.variant and name in models and not find_weights(folder, files):
            warnings.warn(f"{folder}: has no variant {files.variant!r}; its other weights are loaded", stacklevel=3)
            chosen = files._replace(variant=None)
        components[name] = read(cls, folder, chosen)
    return components


def save_components(
    components: Mapping[str, Any],
    settings: Mapping[str, Any],
    class_name: str,
    folder: str | os.PathLike,
    *,
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a pipeline's folder, which afterwards holds all of it or is as it was. Other files in it stay."""
    files = check_save(folder, variant, safe_serialization, max_shard_size or Files().max_shard_size)
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": FORMAT_VERSION, **settings}
    written: dict[str, Component] = {}
    for name, component in components.items():
        index[name] = [None, None]
        if component is not None:
            component = getattr(component, "_orig_mod", component)  # torch.compile wraps it
            if REGISTRY.get(type(component).__name__) is not type(component):
                raise TypeError(f"{name} is a {type(component).__name__}, which isn't minidiff's and can't be saved")
            index[name] = [component.library, type(component).__name__]
            written |= {place.name: part for place, part in component.parts(Path(folder) / name).items()}

    def ends(part: Component) -> Callable[[Path], set[str]]:
        return lambda old: part.replaced(old, files)

    parts = {"": lambda _: set(), **{name: ends(part) for name, part in written.items()}}
    with replacing(Path(folder), parts) as stages:
        for name, component in written.items():
            component.write_to(stages[name], files)
        write_json(stages[""] / INDEX, index)
