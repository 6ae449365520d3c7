"""A Hub folder with random weights, made from a manifest: what loads it loads the real one.

Every parameter is random, norms' weights and biases too: one that lands in the wrong place changes the output.
"""

import json
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from .clip_vocabulary import write_clip_tokenizer
from .manifests import Manifest

STEMS = {"transformers": "model", "stable_diffusion": "model", "diffusers": "diffusion_pytorch_model"}


def make_random_folder(manifest: Manifest, folder: Path, seed: int = 0) -> None:
    """Writes float32 safetensors, tensor by tensor: the memory this takes is that of the largest one.

    Raises OSError if the disk hasn't the room.
    """
    needed = sum(4 * prod(shape) for tensors in manifest.tensors.values() for shape in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed * 1.01:
        raise OSError(f"{folder}: {free / 1e9:.1f} GB are free, but the weights need {needed / 1e9:.1f} GB")
    generator = torch.Generator().manual_seed(seed)
    for name in manifest.index:
        if name.startswith("tokenizer"):
            write_clip_tokenizer(folder / name)  # the vocabulary; the manifest has this folder's own settings
    for path, values in manifest.files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for component, shapes in manifest.tensors.items():
        stem = STEMS[manifest.index[component][0]]
        write_safetensors(folder / component / f"{stem}.safetensors", shapes, lambda *args: random(*args, generator))


def random(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Noise at a scale that keeps activations near 1 through the whole network."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if noise.ndim == 1:  # a norm's weight
        return 1 + 0.2 * noise
    if "_embedding.weight" in name:  # a table: CLIP's tokens and positions
        return 0.3 * noise
    return noise / prod(shape[1:]) ** 0.5  # a sum over this many inputs


def write_safetensors(file: Path, shapes: dict[str, list[int]], make: Callable[[str, list[int]], torch.Tensor]) -> None:
    """safetensors.torch.save_file wants all tensors at once; the format is a length, a JSON header, and the bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            out.write(make(name, shape).numpy().data)
