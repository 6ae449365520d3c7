"""One folder, two sides: what the reference and minidiff load from it, and the inputs that both are given."""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .manifests import reference_class

# What the reference calls things, and what it can't do
PICTURE_READERS = dict.fromkeys(("CLIPFeatureExtractor", "CLIPImageProcessor"), "CLIPImageProcessorPil")
SAME_PARTS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # a folder of one is one of the others too
# PRK steps turn float16 into float32, which the network then refuses; NumPy has no bfloat16 for the picture
REFERENCE_FAILS = {
    torch.float16: ("PNDMPipeline",),
    torch.bfloat16: (*SAME_PARTS, "LDMPipeline", "LDMTextToImagePipeline", "ScoreSdeVePipeline"),
}

TEXTS = [
    "a photograph of an astronaut riding a horse",
    "",
    "  two  spaces,\ttabs\nand\r\nlines \u00a0\u3000 ",
    "Crème brûlée à la São Tomé; e\u0301 a\u030a \ufb01 ß İ ŉ",
    "it's we're I'll they've don't I'M you'D o'clock ''s",
    "in 1984: 3,141.59 \u00d7 10⁻³ ½ Ⅷ ٣٤",
    "一只猫坐在垫子上。東京タワー 서울 กรุงเทพ हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ 🇨🇭 ☃",
    "\x00\x01\x07control\x1b[0m \u200b\u200d\u202e\ufeff\x7f\x85",
    "<|startoftext|>inside<|endoftext|> and <|ENDOFTEXT|> and !!! !",
    "antidisestablishmentarianism-pneumonoultramicroscopicsilicovolcanoconiosis",
    "(masterpiece:1.3), [blurry], {a|b}, <lora:x:0.7>, https://example.org/?q=1&r=2#top",
    "\U0001d54b\U0001d559\U0001d556 ꙮ \U00010348 \ue000 \ufffd",
    "a" * 400,
    "a red apple, " * 250,
]


class Inputs(NamedTuple):
    """Random inputs that are the same for both sides."""

    device: str
    dtype: torch.dtype
    steps: int
    seed: int

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=self.generator(seed)).to(self.device, self.dtype)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + seed)

    def picture(self, height: int, width: int) -> Image.Image:
        pixels = np.random.default_rng(self.seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class Side(NamedTuple):
    """Loads from the folder, with the reference or with minidiff."""

    reference: bool
    folder: Path
    index: dict[str, Any]
    device: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "the reference" if self.reference else "minidiff"

    def component(self, name: str) -> Any:
        library, class_name = self.index[name]
        if self.reference:
            cls = reference_class(library, PICTURE_READERS.get(class_name, class_name))
        else:
            cls = our_class(class_name)
        if not hasattr(cls, "forward"):
            return cls.from_pretrained(str(self.folder), subfolder=name)
        dtype = {"dtype" if hasattr(cls, "config_class") else "torch_dtype": self.dtype}  # transformers' name, or ours
        return cls.from_pretrained(str(self.folder), subfolder=name, **dtype).to(self.device)

    def pipeline(self, class_name: str | None = None) -> Any:
        """The folder's pipeline, or its components under the class `class_name`."""
        library = importlib.import_module("diffusers" if self.reference else "minidiff")
        left_out = {"safety_checker": None, "requires_safety_checker": False}  # black pictures would hide differences
        left_out = left_out if "safety_checker" in self.index else {}
        pipe = library.DiffusionPipeline.from_pretrained(str(self.folder), torch_dtype=self.dtype, **left_out)
        if class_name is not None:
            pipe = getattr(library, class_name)(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)


def our_class(name: str) -> Any:
    """minidiff's class of this name, or None."""
    import minidiff
    from minidiff.loading.component import REGISTRY

    return REGISTRY.get(name) or getattr(minidiff, name, None)
