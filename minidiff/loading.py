"""The loader: a Hub id or a folder becomes components, and components become a folder. It knows files, no mathematics.

A pipeline's folder holds `model_index.json`, which names each component's class, and a folder for each component:

    model_index.json                            "unet": ["diffusers", "UNet2DConditionModel"], ...
    unet/config.json                            the keys of the constructor
    unet/diffusion_pytorch_model.safetensors    (text encoders: model.safetensors) whole, or in shards with an index
    scheduler/scheduler_config.json
    tokenizer/vocab.json, merges.txt, ...

Weights are mapped into memory, not copied: a tensor is read from the disk when it is first used.
"""

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights_compat import TABLES

from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .config import LoadError, Model, read_json
from .schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from .tokenizer import CLIPTokenizer
from .unet import UNet2DConditionModel, UNet2DModel
from .vae import AutoencoderKL

FORMAT_VERSION = "0.42.0"  # of diffusers, whose folder layout this is

CLASSES: dict[str, type] = {
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "DDIMScheduler": DDIMScheduler,
    "DDPMScheduler": DDPMScheduler,
    "PNDMScheduler": PNDMScheduler,
    "UNet2DConditionModel": UNet2DConditionModel,
    "UNet2DModel": UNet2DModel,
}

# Every file that is read in a component's folder, beside its weights. A save ends these, and no other
SMALL_FILES = (
    *("config.json", "scheduler_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)

# Parts of real folders that a picture doesn't depend on and that aren't written yet
LEFT_OUT = ("StableDiffusionSafetyChecker", "CLIPFeatureExtractor", "CLIPImageProcessor")
NEVER_READ = ("safety_checker", "feature_extractor")  # their folders


class Files(NamedTuple):
    """Which of a folder's files to read, and as what: the fields are arguments of `from_pretrained`."""

    dtype: torch.dtype = torch.float32
    variant: str | None = None
    use_safetensors: bool | None = None


# From a Hub id to a local folder


def fetch(
    path: str | os.PathLike,
    names: Callable[[list[str]], list[str]],
    first: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder `path`, or the local copy of the Hub repository `path`, downloaded if need be.

    `names` picks, out of all the files of a repository, those that will be read: only they are downloaded.
    Offline (`local_files_only` or HF_HUB_OFFLINE=1) the copy in the cache is taken as it is, if it has `first`.

    Raises LoadError if there is no such folder and no such repository, TypeError if `path` isn't a path.
    """
    _check_path(path, "pretrained_model_name_or_path", "a folder or a Hub id")
    folder = Path(path)
    for place in (folder, _displaced(folder)):  # the latter if a save was cut off between its two renames
        if os.path.isdir(place):  # which says False, unlike Path, where a name is too long
            return place
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path)) or os.path.exists(folder):
        raise LoadError(f"{path}: there is no such folder, and it is no Hub id (as in org/name) either")

    from huggingface_hub import HfApi, constants, snapshot_download  # takes its time, and most folders are local

    wanted, problem, offline = [first], None, local_files_only or constants.HF_HUB_OFFLINE
    if not offline:
        try:
            info = HfApi(token=token).model_info(str(path), revision=revision)
            wanted = names([file.rfilename for file in info.siblings])
        except Exception as error:  # no network, no such repository, no permission: the cache may have it all the same
            problem, offline = error, True
    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted, local_files_only=offline, **where))
    except Exception as error:  # requests', the cache's and the disk's: huggingface_hub has no one base for them
        raise LoadError(f"{path}: no such folder here, and not to be had from the Hub: {problem or error}") from error


# Components


def load_component(
    cls: type,
    path: str | os.PathLike,
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
) -> Any:
    """One model, scheduler or tokenizer, from the folder or Hub repository `path`, or from a `subfolder` of it.

    `dtype` (`torch_dtype` is its older name): of the weights; float32 if None, whatever the files hold. `variant`: of
    the files, such as "fp16". `use_safetensors`: True takes no pickles, False only pickles; None prefers safetensors.
    `revision`, `cache_dir`, `token`, `local_files_only` are huggingface_hub's.

    Raises LoadError for a missing or damaged file, ConfigError for a key or value that isn't supported.
    """
    files = which_files(dtype or torch_dtype, variant, use_safetensors)
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    first = f"{subfolder}/*config.json" if subfolder else "*config.json"
    folder = fetch(path, lambda names: _wanted(names, subfolder or "", files), first, **hub)
    return read_component(cls, folder / (subfolder or ""), files)


def read_component(cls: type, folder: Path, files: Files) -> Any:
    """An object of the class `cls` from the local `folder`."""
    if cls is CLIPTokenizer:
        return cls.from_folder(folder)
    if not issubclass(cls, Model):
        file = folder / "scheduler_config.json"
        return cls(cls.Config.read(read_json(file), str(file)))
    file = folder / "config.json"
    values = read_json(file)
    if values.get("_class_name", cls.__name__) != cls.__name__:
        raise LoadError(f"{file}: _class_name={values['_class_name']!r}, but a {cls.__name__} is asked for")
    config = cls.Config.read(values, str(file))
    with torch.device("meta"):  # no memory, no random first weights
        model = cls(config)
    model.load_state_dict(_read_weights(model, folder, files), assign=True)
    return model.eval()


def load_components(
    index_file: Path, given: Mapping[str, Any], files: Files, expected: tuple[str, ...], settings: tuple[str, ...]
) -> dict[str, Any]:
    """What `model_index.json` names: components, and `settings`, which stand there as they are.

    Those `given` aren't read. Raises LoadError for a name that isn't `expected`, and for an unknown class.
    """
    components, left_out = {}, []
    to_read = {}
    for name, spec in read_json(index_file).items():
        if name.startswith("_") or name in given:
            continue
        if name not in expected:
            raise LoadError(f"{index_file}: {name} is not supported; supported: {', '.join(expected)}")
        if name in settings:
            if not isinstance(spec, bool | None):
                raise LoadError(f"{index_file}: {name}={spec!r} must be true or false")
            components[name] = spec
        elif spec == [None, None]:
            components[name] = None
        elif not isinstance(spec, list) or len(spec) != 2 or not all(isinstance(part, str) for part in spec):
            raise LoadError(f"{index_file}: {name}={spec!r} must be [library, class] or [null, null]")
        elif spec[1] in LEFT_OUT:
            components[name] = None
            left_out.append(f"{name} ({spec[1]})")
        elif spec[1] not in CLASSES:
            raise LoadError(f"{index_file}: {name} has the unknown class {spec[1]!r}; supported: {', '.join(CLASSES)}")
        else:
            to_read[name] = CLASSES[spec[1]]
    root = index_file.parent
    at_root = (root / "config.json").exists()  # the DDPM paper's own repositories have no folder for each component
    folders = {name: root if at_root and not (root / name).is_dir() else root / name for name in to_read}
    models = [name for name, cls in to_read.items() if issubclass(cls, Model)]
    if files.variant and models and not any(_weights(folders[name], files) for name in models):
        raise LoadError(f"{root}: no component has weights of the variant {files.variant!r}")
    for name, cls in to_read.items():
        folder, chosen = folders[name], files
        if files.variant and name in models and not _weights(folder, files):
            warnings.warn(f"{folder}: has no variant {files.variant!r}; its other weights are loaded", stacklevel=3)
            chosen = files._replace(variant=None)
        components[name] = read_component(cls, folder, chosen)
    if left_out:
        warnings.warn(f"Loaded as None, since minidiff doesn't have them yet: {', '.join(left_out)}", stacklevel=3)
    return components


# Weights


def _candidates(files: Files) -> Iterator[str]:
    """Every name that a component's weights, or the index of their shards, can have; the preferred one first."""
    dot = f".{files.variant}" if files.variant else ""
    if files.use_safetensors is not False:
        for stem in ("diffusion_pytorch_model", "model"):
            yield f"{stem}{dot}.safetensors"
            yield f"{stem}.safetensors.index{dot}.json"
    if not files.use_safetensors:
        for stem in ("diffusion_pytorch_model", "pytorch_model"):
            yield f"{stem}{dot}.bin"
            yield f"{stem}.bin.index{dot}.json"


def _weights(folder: Path, files: Files) -> Path | None:
    """The file of a component's weights, or the index of its shards; None if it has neither."""
    return next((folder / name for name in _candidates(files) if (folder / name).exists()), None)


def _wanted(names: list[str], folder: str, files: Files) -> list[str]:
    """Of all files of a repository, those that loading the component in `folder` will read."""
    inside = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
    wanted = [file for file in inside if file.name in SMALL_FILES]
    here = {file.name: file for file in inside}
    chosen = next((name for name in _candidates(files) if name in here), None)
    if chosen is None and files.variant:
        return _wanted(names, folder, files._replace(variant=None))
    if chosen is not None:
        wanted.append(here[chosen])
    if chosen is not None and ".index." in chosen:
        stem, suffix = chosen.split(".")[:2]
        wanted += [file for file in inside if re.fullmatch(rf"{stem}.*-\d+-of-\d+.*\.{suffix}", file.name)]
    return [str(file) for file in wanted]


def wanted_by_pipeline(names: list[str], files: Files, given: Mapping[str, Any]) -> list[str]:
    """Of all files of a repository, those that loading its pipeline will read. Components `given` aren't."""
    folders = {name.split("/")[0] for name in names if name.count("/") == 1} - given.keys() - set(NEVER_READ)
    folders |= {""} if "config.json" in names else set()
    return ["model_index.json", *(file for folder in sorted(folders) for file in _wanted(names, folder, files))]


def _read_weights(model: Model, folder: Path, files: Files) -> dict[str, Tensor]:
    """The model's tensors under our names: every one that it has, each of its shape, and no other."""
    file = _weights(folder, files)
    if file is None:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
        raise LoadError(
            f"{folder}: no weights found; looked for {', '.join(_candidates(files))}."
            f" It holds {', '.join(others) or 'no weight files at all'}"
        )
    table, shapes = TABLES[type(model).__name__], {name: p.shape for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for part in _shards(file) if ".index." in file.name else [file]:
        read = _read_safetensors if part.suffix == ".safetensors" else _read_pickle
        for name, tensor in read(part):
            if table.is_ignored(name):
                continue
            ours = table.ours(name)
            if ours not in shapes:
                raise LoadError(f"{part}: the tensor {name} has no place in {type(model).__name__} with this config")
            if ours in tensors:
                raise LoadError(f"{part}: the tensor {name} comes twice, under two names or in two files")
            if tensor.shape != shapes[ours]:
                raise LoadError(
                    f"{part}: the tensor {name} has shape {tuple(tensor.shape)}; config.json makes it"
                    f" {tuple(shapes[ours])}"
                )
            if not tensor.is_floating_point():
                raise LoadError(f"{part}: the tensor {name} is {tensor.dtype}, not a floating-point type")
            tensors[ours] = tensor.to(files.dtype)  # no copy if it is that already
    if missing := [name for name in shapes if name not in tensors]:
        raise LoadError(f"{file}: {len(missing)} tensors are missing, the first is {table.hub(missing[0])}")
    return tensors


def _shards(index_file: Path) -> list[Path]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index_file}: weight_map must give a file name for each tensor")
    for name in weight_map.values():
        if name != PurePosixPath(name).name or "\\" in name:  # the folder is the border
            raise LoadError(f"{index_file}: weight_map names {name!r}, which isn't a file beside it")
        if not (index_file.parent / name).exists():
            raise LoadError(f"{index_file.parent / name}: no such file, though {index_file.name} names it")
    return [index_file.parent / name for name in dict.fromkeys(weight_map.values())]


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file}: not a whole safetensors file: {error}") from None


def _read_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:  # weights_only: no code in the file is run. Only torch's present format, a zip, can be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # pickle, zip and torch each have their own, and any byte of the file can be wrong
        problem = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"{file}: can't be read as a file of weights alone: {problem}") from None
    if not isinstance(tensors, dict):
        raise LoadError(f"{file}: must hold a dictionary of tensors, not {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise LoadError(f"{file}: {name!r} is {type(tensor).__name__}, not a tensor")
        yield name, tensor


# Saving


def save_component(
    component: Any, folder: str | os.PathLike, *, variant: str | None = None, safe_serialization: bool = True
) -> None:
    """Writes one model, scheduler or tokenizer to `folder`, which afterwards holds all of it or is as it was."""
    _check_save(folder, variant, safe_serialization)
    with replacing(Path(folder), lambda old: _own(old, variant)) as new:
        write_component(component, new, variant)


def save_components(
    components: Mapping[str, Any],
    settings: Mapping[str, Any],
    class_name: str,
    folder: str | os.PathLike,
    *,
    variant: str | None = None,
    safe_serialization: bool = True,
) -> None:
    """Writes a pipeline's folder, which afterwards holds all of it or is as it was. Other files in it stay."""
    _check_save(folder, variant, safe_serialization)
    index = {"_class_name": class_name, "_diffusers_version": FORMAT_VERSION}
    for name, component in components.items():
        if component is not None and type(component) not in CLASSES.values():
            raise TypeError(f"{name} is a {type(component).__name__}, which isn't minidiff's and can't be saved")
        library = "transformers" if type(component).__name__.startswith("CLIP") else "diffusers"
        index[name] = [None, None] if component is None else [library, type(component).__name__]

    def own(old: Path) -> set[str]:
        written = [name for name, component in components.items() if component is not None]
        return {"model_index.json"} | {f"{name}/{file}" for name in written for file in _own(old / name, variant)}

    with replacing(Path(folder), own) as new:
        for name, component in components.items():
            if component is not None:
                (new / name).mkdir()
                write_component(component, new / name, variant)
        _write_json(new / "model_index.json", {**index, **settings})


def write_component(component: Any, folder: Path, variant: str | None) -> None:
    if isinstance(component, CLIPTokenizer):
        component.save(folder)
        return
    header = {"_class_name": type(component).__name__, "_diffusers_version": FORMAT_VERSION}
    if not isinstance(component, Model):
        _write_json(folder / "scheduler_config.json", {**header, **component.config})
        return
    stem = "diffusion_pytorch_model"
    config = dict(component.config)
    if isinstance(component, CLIPTextModel):
        stem, header = "model", {"architectures": [type(component).__name__], "model_type": "clip_text_model"}
        config.pop("dtype", None)
        config |= header | {"torch_dtype": str(component.dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", {**header, **config})
    table = TABLES[type(component).__name__]
    tensors = {table.hub(name): tensor.detach().contiguous() for name, tensor in component.state_dict().items()}
    dot = f".{variant}" if variant else ""
    file = folder / f"{stem}{dot}.safetensors"
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: can't be written: {error}") from None


@contextmanager
def replacing(folder: Path, own: Callable[[Path], set[str]]) -> Iterator[Path]:
    """A new folder to write to. When the block ends well it takes the place of `folder`, by two renames.

    `own(folder)` names the old files that end with this save; all others are carried over, as links where the file
    system has them. If the block fails, or the process dies in it, `folder` is untouched. If the process dies between
    the renames, the old folder lies beside, where `fetch` finds it and the next save puts it back.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it points to is replaced
    new, old = folder.with_name(f".{folder.name}.saving"), _displaced(folder)
    if folder.exists() and not folder.is_dir():
        raise LoadError(f"{folder}: a file of that name is in the way")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            _carry_over(folder, new, own(folder))
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _displaced(folder: Path) -> Path:
    """Where the old folder lies in the instant in which a save puts the new one in its place."""
    folder = Path(os.path.realpath(folder))
    return folder.parent / f".{folder.name}.replaced"


def _own(folder: Path, variant: str | None) -> set[str]:
    """The files in a component's folder that loading it, in this variant, would read: a save ends them all."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return {name for kind in (True, False) for name in _wanted(names, "", Files(variant=variant, use_safetensors=kind))}


def _carry_over(old: Path, new: Path, own: set[str]) -> None:
    for file in old.rglob("*"):
        name = file.relative_to(old)
        target = new / name
        if name.as_posix() in own or target.exists():
            continue
        if file.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(file))
        elif file.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:  # a file system without hard links
                shutil.copy2(file, target)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def which_files(dtype: torch.dtype | None, variant: str | None, use_safetensors: bool | None) -> Files:
    """Checks these arguments of `from_pretrained`. Raises ValueError or TypeError."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, not {dtype!r}")
    if use_safetensors not in (None, True, False):
        raise TypeError(f"use_safetensors must be True, False or None, not {use_safetensors!r}")
    _check_variant(variant)
    return Files(dtype or torch.float32, variant, use_safetensors)


def _check_path(path: str | os.PathLike, argument: str, must: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument} must be {must}, not {type(path).__name__}")
    if "\0" in os.fspath(path):
        raise LoadError(f"{argument}={path!r}: no path has a null character in it")


def _check_variant(variant: str | None) -> None:
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"\w+", variant)):
        raise ValueError(f'variant must be a word such as "fp16", not {variant!r}')


def _check_save(folder: str | os.PathLike, variant: str | None, safe_serialization: bool) -> None:
    _check_path(folder, "save_directory", "a folder")
    _check_variant(variant)
    if safe_serialization is not True:
        raise ValueError("safe_serialization must be True: minidiff reads pickles, and writes none")
