"""Folders of real repositories, narrow and with random weights, in every layout that is found on the Hub."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder

LAYOUTS = ("plain", "fp16", "legacy", "modern", "shards", "pickle")

NAMES_OF_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def make_folder(repository: str, folder: Path, layout: str = "plain", seed: int = 0) -> Path:
    """A narrow copy of a real repository, with all its files but the safety checker's weights."""
    manifest = narrow(read_manifest(repository))
    manifest.tensors.pop("safety_checker", None)
    make_random_folder(manifest, folder, seed)
    for file in sorted(folder.glob("*/*.safetensors")):
        relayout(file, layout)
    return folder


def relayout(file: Path, layout: str) -> None:
    tensors, component = load_file(file), file.parent.name
    if layout == "fp16":
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    elif layout == "legacy":
        save_file(dict(legacy(component, tensors)), file, metadata={"format": "pt"})
    elif layout == "modern":
        short = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        save_file(short, file, metadata={"format": "pt"})
    elif layout == "pickle":
        stem = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(tensors, file.with_name(f"{stem}.bin"))
        file.unlink()
    elif layout == "shards":
        names = list(tensors)
        weight_map = {}
        for i in range(3):
            part = f"{file.stem}-{i + 1:05}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names[i::3]}, file.with_name(part), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names[i::3], part)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        file.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
        file.unlink()


def legacy(component: str, tensors: dict[str, torch.Tensor]):
    """The names of 2022: of the attention in the VAE and in UNet2DModel, and a buffer in the text encoder."""
    in_pixels = component == "vae" or not any("transformer_blocks" in name for name in tensors)
    for name, tensor in tensors.items():
        if in_pixels and ".attentions." in name:
            for new, old in NAMES_OF_2022.items():
                name = name.replace(f".{new}.", f".{old}.")
        yield name, tensor
    if component == "text_encoder":
        yield "text_model.embeddings.position_ids", torch.arange(77).unsqueeze(0)
