"""CLIPImageProcessor: pictures to what CLIP's image encoder reads. Pillow resizes, as it did when CLIP was trained."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..loading.component import Configured
from ..loading.config import Config, Width

FILE = "preprocessor_config.json"
EDGE = {"shortest_edge": 224}
SQUARE = {"height": 224, "width": 224}


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPImageProcessorConfig(Config):
    """The keys of CLIPImageProcessor. Sizes are a number, or an object as in their defaults."""

    do_resize: bool = True
    size: Width | dict | None = None  # None: EDGE, as the reference's files say
    resample: Literal[3, 0, 1, 2, 4, 5] = 3  # Pillow's number of a filter: bicubic
    do_center_crop: bool = True
    crop_size: Width | dict | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    do_convert_rgb: bool = True

    def __post_init__(self):
        super().__post_init__()
        for key, kinds in (("size", (EDGE, SQUARE)), ("crop_size", (SQUARE,))):
            value = self[key]
            if isinstance(value, dict):
                fits = any(value.keys() == kind.keys() for kind in kinds)
                fits = fits and all(type(side) is int and 0 < side <= 2**20 for side in value.values())
                self.require(fits, key, f"be a number or such as {' or '.join(map(str, kinds))}")
        for key in ("image_mean", "image_std"):
            self.require(len(self[key]) == 3, key, "have three numbers")
        self.require(0 not in self.image_std, "image_std", "not be zero")


class PixelValues(dict):
    """What the call returns: `pixel_values` (B, 3, H, W), by attribute or by key."""

    @property
    def pixel_values(self) -> Tensor:
        return self["pixel_values"]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and converts the tensor."""
        return PixelValues(pixel_values=self["pixel_values"].to(*args, **kwargs))


class CLIPImageProcessor(Configured):
    """The shorter side to `size`, the middle cut out, values to a mean of about 0 and a deviation of about 1."""

    Config = CLIPImageProcessorConfig
    library = "transformers"
    aliases = ("CLIPFeatureExtractor", "CLIPImageProcessorPil")  # as older folders and newer ones call it
    files: ClassVar[tuple[str, ...]] = (FILE,)

    def file_config(self) -> dict[str, Any]:
        sizes = {"size": self.size, "crop_size": self.crop_size, "image_processor_type": "CLIPImageProcessor"}
        return {**self.config, **sizes}

    @property
    def size(self) -> dict[str, int]:
        size = self.config.size
        return {"shortest_edge": size} if isinstance(size, int) else size or EDGE

    @property
    def crop_size(self) -> dict[str, int]:
        size = self.config.crop_size
        return {"height": size, "width": size} if isinstance(size, int) else size or SQUARE

    def __call__(
        self, images: Image.Image | np.ndarray | list[Image.Image] | list[np.ndarray], return_tensors: str = "pt"
    ) -> PixelValues:
        """PIL images, or arrays (H, W, 3) of whole numbers to 255 (uint8) -> `pixel_values` (B, 3, H, W), float32."""
        if return_tensors != "pt":
            raise ValueError(f'return_tensors={return_tensors!r} must be "pt": minidiff is PyTorch alone')
        images = images if isinstance(images, list | tuple) else [images]
        arrays = [self._process(image) for image in images]
        if len({array.shape for array in arrays}) != 1:
            shapes = ", ".join(str(array.shape) for array in arrays) or "none"
            raise ValueError(
                f"images give arrays of different shapes, or none: {shapes}; do_center_crop makes them one"
            )
        return PixelValues(pixel_values=torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())

    def _process(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """(H, W, 3), float32 as a rule."""
        c = self.config
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"images must be PIL images, or uint8 arrays (height, width, 3), not {type(image).__name__}"
            )
        image = image.convert("RGB") if c.do_convert_rgb else image
        if image.mode != "RGB":
            raise ValueError(f"images has one of mode {image.mode}, which do_convert_rgb=False leaves as it is")
        if c.do_resize:
            image = image.resize(self._resized(*image.size), resample=c.resample)
        if c.do_center_crop:
            height, width = self.crop_size["height"], self.crop_size["width"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # what lies outside is black
        array = np.array(image)
        if c.do_rescale:
            array = (array.astype(np.float64) * c.rescale_factor).astype(np.float32)
        if c.do_normalize:
            array = (array.astype(np.float32) - np.array(c.image_mean, np.float32)) / np.array(c.image_std, np.float32)
        return array

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        edge = self.size["shortest_edge"]
        longer = int(edge * max(width, height) / min(width, height))
        return (edge, longer) if width <= height else (longer, edge)


CLIPImageProcessorConfig.fixed = {"do_pad": Literal[None, False], "use_square_size": False}
CLIPImageProcessorConfig.inert = dict.fromkeys(
    ("feature_extractor_type", "image_processor_type", "processor_class", "use_fast", "resample_mode"),
    "names the class that wrote the file",
)
