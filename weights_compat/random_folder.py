"""A Hub folder with random weights, made from a manifest: what loads it loads the real one.

Every parameter is random, norms' weights and biases too: one that lands in the wrong place changes the output. Where
names and shapes alone are asked for, sparse files do: all zeros, and no room on the disk.
"""

import itertools
import json
import shutil
import string
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from .manifests import Manifest
from .standard import write_files

Make = Callable[[str, list[int]], torch.Tensor]


def make_random_folder(manifest: Manifest, folder: Path, seed: int = 0) -> None:
    """Writes float32 safetensors, tensor by tensor: the memory this takes is that of the largest one.

    Raises OSError if the disk hasn't the room.
    """
    needed = sum(4 * prod(shape) for tensors in manifest.tensors.values() for shape in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed * 1.01:
        raise OSError(f"{folder}: {free / 1e9:.1f} GB are free, but the weights need {needed / 1e9:.1f} GB")
    generator = torch.Generator().manual_seed(seed)
    make_folder(manifest, folder, lambda name, shape: random(name, shape, generator))


def make_folder(manifest: Manifest, folder: Path, make: Make | None = None) -> None:
    """Writes the folder with the tensors that `make` gives for a name and a shape, or else with zeros."""
    write_files(manifest.files, folder)
    for name, spec in manifest.index.items():
        if name.startswith("tokenizer") and spec[1] and spec[1].startswith("Bert"):
            write_bert_tokenizer(folder / name)
    for component, shapes in manifest.tensors.items():
        stem = "diffusion_pytorch_model" if manifest.index[component][0] == "diffusers" else "model"
        write_safetensors(folder / component / f"{stem}.safetensors", shapes, make)


def write_bert_tokenizer(folder: Path, size: int = 30522) -> None:
    """A vocabulary of the real one's size: the special tokens at their places, then characters, and each word of up to
    three letters, as a word's beginning and as what follows in it."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    tokens = [special.get(i, f"[unused{i}]") for i in range(1000)]
    tokens += [*string.digits, *string.punctuation]
    letters = string.ascii_lowercase
    words = ("".join(word) for length in (1, 2, 3) for word in itertools.product(letters, repeat=length))
    tokens += [f"{start}{word}" for word in words for start in ("", "##")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens[:size]) + "\n", encoding="utf-8")


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


def write_safetensors(file: Path, shapes: dict[str, list[int]], make: Make | None) -> None:
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
        for name, shape in shapes.items() if make else ():
            out.write(make(name, shape).numpy().data)
        out.truncate(8 + len(text) + end)  # the hole, where nothing was written, takes no room
