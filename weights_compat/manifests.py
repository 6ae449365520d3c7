"""Manifests: what a real Hub repository holds, without its weights. One file for each, in `manifests/`:

    {"repository": "org/name",
     "files": {"model_index.json": {...}, "unet/config.json": {...}, ...},       every JSON file, as it stands there
     "tensors": {"unet": {"conv_in.weight": [320, 4, 3, 3], ...}, ...}}         every tensor: name and shape

Names and shapes are those of the reference's own modules, built from the configs on the meta device, so that they can
tell whether ours are right. (Files from 2022 hold older names for some; the tables have them as aliases.)
The JSON of the systems of 2021, ldm-* and ncsnpp-*, is written from their papers' code; that of pix2pix is of a model
tuned from it; XL's inpainting is XL with a UNet of 9 channels.
`python -m weights_compat.manifests FOLDER REPOSITORY` writes a manifest from a folder.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "manifests"

SMALL_WIDTH = 32  # channels of the first level of a narrowed UNet or VAE; the others keep their ratio to it

# Lengths that a narrowed config divides by 32; the sums that real configs obey still hold
DIVIDED = (
    "hidden_size",
    "d_model",
    "encoder_ffn_dim",
    "head_dim",
    "intermediate_size",
    "projection_dim",
    "cross_attention_dim",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


# Classes that the reference keeps with a pipeline: what model_index.json calls their library, and where they are
WITH_PIPELINES = {
    "stable_diffusion": "diffusers.pipelines.stable_diffusion.safety_checker",
    "latent_diffusion": "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
}


class Manifest(NamedTuple):
    repository: str
    files: dict[str, dict[str, Any]]  # path -> the JSON object in it
    tensors: dict[str, dict[str, list[int]]]  # component -> the Hub's name -> shape

    @property
    def index(self) -> dict[str, Any]:
        return self.files["model_index.json"]

    def config(self, component: str) -> dict[str, Any]:
        return self.files[f"{component}/config.json"]


def manifest_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_manifest(name: str) -> Manifest:
    """The manifest of that name, or of the repository `name`. Raises ValueError, with the names, if there is none."""
    stem = name.rpartition("/")[2]
    if stem in manifest_names():
        manifest = Manifest(**json.loads((FOLDER / f"{stem}.json").read_text(encoding="utf-8")))
        if name in (stem, manifest.repository):
            return manifest
    raise ValueError(f"{name}: there is no such manifest; there are {', '.join(manifest_names())}")


def narrow(manifest: Manifest) -> Manifest:
    """The same structure at a size for tests: every block of every kind, but narrow and, in the text encoders, few."""
    files = dict(manifest.files)
    for component in manifest.tensors:
        files[f"{component}/config.json"] = narrow_config(manifest.config(component))
    return Manifest(manifest.repository, files, reference_tensors(files))


def at_sample_size(manifest: Manifest, size: int) -> Manifest:
    """The same weights, for samples of this height and width in the UNet, and for the VAE's pictures of them."""
    files = dict(manifest.files)
    for path, config in files.items():
        if "block_out_channels" in config:
            factor = 2 ** (len(config["block_out_channels"]) - 1) if "latent_channels" in config else 1
            files[path] = at_size(config, size * factor)
    return manifest._replace(files=files)


def at_size(config: dict[str, Any], sample_size: int) -> dict[str, Any]:
    """Without its version: before 0.9 a size below 64 would be taken for a mistake, and for 64."""
    return {key: value for key, value in config.items() if key != "_diffusers_version"} | {"sample_size": sample_size}


def steered(manifest: Manifest) -> Manifest:
    """The same with a ControlNet beside its UNet, and the pipeline that it steers."""
    import diffusers

    known = inspect.signature(diffusers.ControlNetModel).parameters
    config = {key: value for key, value in manifest.config("unet").items() if key in known}
    config |= {"_class_name": "ControlNetModel", "in_channels": manifest.config("vae")["latent_channels"]}
    name = steered_name(manifest.index["_class_name"])
    index = manifest.index | {"_class_name": name, "controlnet": ["diffusers", "ControlNetModel"]}
    files = manifest.files | {"model_index.json": index, "controlnet/config.json": config}
    tensors = manifest.tensors | {"controlnet": _tensors(*index["controlnet"], config)}
    return Manifest(manifest.repository, files, tensors)


def steered_name(pipeline: str) -> str:
    return re.sub("(Img2Img|Inpaint)?Pipeline$", r"ControlNet\1Pipeline", pipeline)


def narrow_config(config: dict[str, Any]) -> dict[str, Any]:
    small = {key: narrow_config(value) if isinstance(value, dict) else value for key, value in config.items()}
    small |= {key: small[key] // 32 for key in DIVIDED if small.get(key)}
    if small.get("num_attention_heads"):  # CLIP
        small |= {"num_hidden_layers": 3, "num_attention_heads": small["num_attention_heads"] // 4}
    if "encoder_layers" in small:  # LDM's text encoder
        small |= {"encoder_layers": 3, "num_hidden_layers": 3}
    if "patch_size" in small:  # CLIP's vision encoder
        small["patch_size"] *= 4
    if "block_out_channels" in small:  # UNet, VAE
        widths = small["block_out_channels"]
        small["block_out_channels"] = [width * SMALL_WIDTH // widths[0] for width in widths]
        if small.get("norm_num_groups", 32) is not None:  # null: one for four channels
            small["norm_num_groups"] = 8
        small = at_size(small, 32 if "latent_channels" in small else 2 ** len(widths))  # 2 x 2 in the middle
    if isinstance(heads := small.get("attention_head_dim"), list):
        small["attention_head_dim"] = [2 * n // heads[0] for n in heads]
    if depths := small.get("transformer_layers_per_block"):
        small["transformer_layers_per_block"] = (
            [min(n, 3) for n in depths] if isinstance(depths, list) else min(depths, 2)
        )
    return small


def reference_tensors(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """For each model that `model_index.json` names: its tensors in the reference, under the names that the Hub has."""
    return {
        name: _tensors(*spec, files[f"{name}/config.json"])
        for name, spec in sorted(files["model_index.json"].items())
        if f"{name}/config.json" in files
    }


def reference_class(library: str, class_name: str) -> type:
    """What `model_index.json` means by [library, class_name]."""
    return getattr(importlib.import_module(WITH_PIPELINES.get(library, library)), class_name)


def _tensors(library: str, class_name: str, config: dict[str, Any]) -> dict[str, list[int]]:
    import torch

    cls = reference_class(library, class_name)
    with torch.device("meta"):
        of_transformers = hasattr(cls, "config_class")
        model = cls(cls.config_class(**config)) if of_transformers else cls.from_config(config)
    return {_hub_name(class_name, name): list(tensor.shape) for name, tensor in model.state_dict().items()}


def _hub_name(class_name: str, name: str) -> str:
    """transformers 5 left out a prefix that the files on the Hub have, and that it still reads."""
    if class_name == "CLIPTextModel":
        return f"text_model.{name.removeprefix('text_model.')}"
    if class_name == "StableDiffusionSafetyChecker":
        return re.sub(r"^vision_model\.(vision_model\.)?", "vision_model.vision_model.", name)
    return name


def write_manifest(folder: Path, repository: str) -> Path:
    """Reads the JSON files of a Hub folder, its vocabulary left out, and writes the manifest. Returns its path."""
    paths = [folder / "model_index.json", *sorted(folder.glob("*/*.json"))]
    chosen = [
        path for path in paths if path.name not in ("vocab.json", "tokenizer.json") and ".index." not in path.name
    ]
    files = {path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8")) for path in chosen}
    tensors = ",\n".join(  # one a line
        f"    {json.dumps(component)}: {{\n"
        + ",\n".join(f"      {json.dumps(name)}: {json.dumps(shape)}" for name, shape in shapes.items())
        + "\n    }"
        for component, shapes in reference_tensors(files).items()
    )
    head = json.dumps({"repository": repository, "files": files}, indent=2, ensure_ascii=False).removesuffix("\n}")
    target = FOLDER / f"{repository.rpartition('/')[2]}.json"
    target.write_text(f'{head},\n  "tensors": {{\n{tensors}\n  }}\n}}\n', encoding="utf-8")
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "model_index.json").exists():
        sys.exit("usage: python -m weights_compat.manifests FOLDER REPOSITORY")
    print(write_manifest(Path(sys.argv[1]), sys.argv[2]))
