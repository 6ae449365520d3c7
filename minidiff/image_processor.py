"""VaeImageProcessor: pictures of any kind to what a VAE reads, and back."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from .images import as_output, check_output_type, denormalize, normalize, to_pil
from .missing import getter

PipelineImageInput = Image.Image | np.ndarray | Tensor | list[Image.Image] | list[np.ndarray] | list[Tensor]

INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

__all__ = ["PipelineImageInput", "VaeImageProcessor"]
__getattr__ = getter(__name__, __all__)


@dataclass(frozen=True)
class VaeImageProcessor:
    """Pictures of any kind to what a VAE reads (`preprocess`), and back (`postprocess`).

    `vae_scale_factor`: pixels that a latent number spans, of which sizes are made multiples. `vae_latent_channels`: a
    tensor with that many channels is latents, and passes as it is. `resample`, `reducing_gap`: PIL's, for resizing.
    """

    do_resize: bool = True
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: str = "lanczos"
    reducing_gap: int | None = None
    do_normalize: bool = True
    do_binarize: bool = False
    do_convert_rgb: bool = False
    do_convert_grayscale: bool = False

    def __post_init__(self):
        if self.resample not in INTERPOLATION:
            raise ValueError(f"resample={self.resample!r} is not supported; supported: {', '.join(INTERPOLATION)}")
        if self.do_convert_rgb and self.do_convert_grayscale:
            raise ValueError("do_convert_rgb and do_convert_grayscale are both True: choose one")

    @property
    def config(self) -> "VaeImageProcessor":
        return self

    def preprocess(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """A picture or a list of them, PIL, arrays or tensors with values in [0, 1] -> (B, C, H, W) in [-1, 1].

        `height`, `width`: of the result, by default the first picture's. `resize_mode` (see `resize`) and
        `crops_coords` (left, top, right, bottom: cut out first) are for PIL images. Latents come back as they are.

        Raises ValueError for what is no picture, for pictures of different sizes where nothing is resized, and for
        whole numbers up to 255.
        """
        images = self._as_list(image)
        if isinstance(images[0], Image.Image):
            if crops_coords is not None:
                images = [one.crop(crops_coords) for one in images]
            if self.do_resize:
                height, width = self.get_default_height_width(images[0], height, width)
                images = [self.resize(one, height, width, resize_mode) for one in images]
            if mode := "RGB" if self.do_convert_rgb else "L" if self.do_convert_grayscale else None:
                images = [one.convert(mode) for one in images]
            batch = self.numpy_to_pt(self.pil_to_numpy(images))
        else:
            joined = torch.cat if images[0].ndim == 4 else torch.stack
            batch = _same_size(joined, [_tensor(one) for one in images])
            if isinstance(images[0], np.ndarray):
                batch = batch[..., None] if batch.ndim == 3 else batch
                batch = batch.permute(0, 3, 1, 2)
            elif self.do_convert_grayscale and batch.ndim == 3:
                batch = batch[:, None]
            if batch.ndim != 4:
                raise ValueError(f"image has shape {tuple(batch.shape)}; it must be (batch, channels, height, width)")
            if isinstance(images[0], Tensor) and batch.shape[1] == self.vae_latent_channels:
                return batch
            if not batch.is_floating_point() and (batch.dtype != torch.uint8 or batch.max() > 1):
                raise ValueError(f"image is {batch.dtype}: it must be float, in [0, 1] (bytes are divided by 255)")
            if self.do_resize:
                batch = self.resize(batch, *self.get_default_height_width(batch, height, width))
        if self.do_normalize and batch.min() < 0:
            warnings.warn("image has values below 0, so it is taken to be in [-1, 1] already", stacklevel=2)
        elif self.do_normalize:
            batch = normalize(batch)
        return self.binarize(batch) if self.do_binarize else batch

    def _as_list(self, image: PipelineImageInput) -> list[Image.Image] | list[np.ndarray] | list[Tensor]:
        """One picture or a batch as a list of one; gray ones (B, H, W) get their channel where gray is asked for."""
        if self.do_convert_grayscale and isinstance(image, np.ndarray) and image.ndim == 3:
            image = image[None] if image.shape[-1] == 1 else image[..., None]
        if self.do_convert_grayscale and isinstance(image, Tensor) and image.ndim == 3:
            image = image[:, None]
        images = list(image) if isinstance(image, list | tuple) else [image]
        for kind in (Image.Image, np.ndarray, Tensor):
            fits = all(isinstance(one, kind) for one in images)
            if images and fits and (kind is Image.Image or all(one.ndim in (2, 3, 4) for one in images)):
                return images
        raise ValueError(
            "image must be a PIL image, an array, a tensor (of 2, 3 or 4 dimensions), or a list of one of these, not"
            f" {', '.join(sorted({type(one).__name__ for one in images})) or 'an empty list'}"
        )

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """(B, C, H, W) in [-1, 1] -> in [0, 1], "pt": the same shape; "np": (B, H, W, C), float32; "pil": a list.

        "latent" returns it as it is. `do_denormalize` says for each picture whether it is in [-1, 1]; by default
        `do_normalize` does.
        """
        if not isinstance(image, Tensor):
            raise ValueError(f"image must be a tensor, not {type(image).__name__}")
        check_output_type(output_type)
        if output_type == "latent":
            return image
        which = [self.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        if any(which):
            parts = [denormalize(one) if inside else one for one, inside in zip(image, which, strict=True)]
            image = torch.stack(parts)
        return as_output(image, output_type)

    def get_default_height_width(
        self, image: Image.Image | np.ndarray | Tensor, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Height and width, those given or the picture's, down to multiples of `vae_scale_factor`.

        Arrays are (B, H, W, ...), tensors (B, C, H, W).
        """
        if isinstance(image, Image.Image):
            own = image.height, image.width
        else:
            own = image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3]
        height, width = own[0] if height is None else height, own[1] if width is None else width
        factor = self.vae_scale_factor
        if min(height, width) < factor:
            raise ValueError(f"image of {height} x {width} pixels is smaller than vae_scale_factor={factor}")
        return height - height % factor, width - width % factor

    def resize(
        self, image: Image.Image | np.ndarray | Tensor, height: int, width: int, resize_mode: str = "default"
    ) -> Image.Image | np.ndarray | Tensor:
        """To `height` x `width`. Arrays (B, H, W, C) and tensors (B, C, H, W) take the nearest pixel.

        A PIL image is stretched ("default"); or it keeps its shape, and what is too much is cut off ("crop"), or what
        is missing is filled with its outermost rows or columns ("fill").
        """
        if resize_mode not in ("default", "fill", "crop"):
            raise ValueError(f"resize_mode={resize_mode!r} is not supported; supported: default, fill, crop")
        if not isinstance(image, Image.Image):
            if resize_mode != "default":
                raise ValueError(f"resize_mode={resize_mode!r} is for PIL images alone")
            if isinstance(image, np.ndarray):
                return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))
            return F.interpolate(image, size=(height, width))
        filter = INTERPOLATION[self.resample]
        if resize_mode == "default":
            return image.resize((width, height), resample=filter, reducing_gap=self.reducing_gap)
        asked, own = width / height, image.width / image.height  # shapes
        if asked < own if resize_mode == "fill" else asked > own:
            w, h = width, image.height * width // image.width
        else:
            w, h = image.width * height // image.height, height
        left, top = width // 2 - w // 2, height // 2 - h // 2
        resized = image.resize((w, h), resample=filter)
        result = Image.new("RGB", (width, height))
        result.paste(resized, box=(left, top))
        if resize_mode == "fill" and asked < own and top > 0:
            for edge, place in ((0, 0), (h, top + h)):
                result.paste(resized.resize((width, top), box=(0, edge, width, edge)), box=(0, place))
        elif resize_mode == "fill" and asked > own and left > 0:
            for edge, place in ((0, 0), (w, left + w)):
                result.paste(resized.resize((left, height), box=(edge, 0, edge, height)), box=(place, 0))
        return result

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> tuple[int, int, int, int]:
        """The box (left, top, right, bottom) around what is white in a mask, `pad` pixels wider on each side, and
        grown to the shape of `width` x `height` as far as the mask's borders allow."""
        mask = np.array(mask_image.convert("L"))
        if not mask.any():
            raise ValueError("mask_image is black throughout: there is nothing to crop to")
        rows, columns = mask.any(axis=1).nonzero()[0].tolist(), mask.any(axis=0).nonzero()[0].tolist()
        y1, y2 = max(rows[0] - pad, 0), min(rows[-1] + 1 + pad, mask.shape[0])
        x1, x2 = max(columns[0] - pad, 0), min(columns[-1] + 1 + pad, mask.shape[1])
        if (x2 - x1) / (y2 - y1) > width / height:
            y1, y2 = _grown(y1, y2, (x2 - x1) / (width / height), mask.shape[0])
        else:
            x1, x2 = _grown(x1, x2, (y2 - y1) * (width / height), mask.shape[1])
        return x1, y1, x2, y2

    def apply_overlay(
        self,
        mask: Image.Image,
        init_image: Image.Image,
        image: Image.Image,
        crop_coords: tuple[int, int, int, int] | None = None,
    ) -> Image.Image:
        """`image` where the mask is white, `init_image` where it is black. `crop_coords`: where `image` belongs, if it
        was drawn for a part of `init_image` alone."""
        kept = Image.new("RGBa", init_image.size)  # RGBa: colours times opacity, so that edges blend rightly
        kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            base = Image.new("RGBA", init_image.size)
            base.paste(self.resize(image, bottom - top, right - left, "crop"), (left, top))
            image = base.convert("RGB")
        image = image.convert("RGBA")
        image.alpha_composite(kept.convert("RGBA"))
        return image.convert("RGB")

    @staticmethod
    def binarize(image: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """0 below 0.5, 1 from there on, in a new array or tensor."""
        image = image.copy() if isinstance(image, np.ndarray) else image.clone()
        image[image < 0.5] = 0
        image[image >= 0.5] = 1
        return image

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        return image.convert("L")

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """Gaussian blur; `blur_factor` is its standard deviation in pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def pil_to_numpy(images: list[Image.Image] | Image.Image) -> np.ndarray:
        """(B, H, W, C), or (B, H, W) for pictures of one channel; float32, a byte of 255 being 1.

        A picture of mode "1" has True for white, which becomes 1/255 in the reference, and so here: convert it to "L".
        """
        images = images if isinstance(images, list) else [images]
        return _same_size(np.stack, [np.array(image).astype(np.float32) / 255.0 for image in images])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """(B, H, W, C) or (B, H, W) -> (B, C, H, W)."""
        images = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(images.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """(B, C, H, W) -> (B, H, W, C), float32."""
        return as_output(images, "np")

    normalize, denormalize, numpy_to_pil = staticmethod(normalize), staticmethod(denormalize), staticmethod(to_pil)


def _tensor(image: np.ndarray | Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image


def _same_size(join: Callable, images: list) -> np.ndarray | Tensor:
    if len({image.shape[-3:] for image in images}) > 1:
        shapes = ", ".join(str(tuple(image.shape)) for image in images)
        raise ValueError(f"image is a list of different sizes, {shapes}: resize them to one")
    return join(images)


def _grown(start: int, end: int, length: float, limit: int) -> tuple[int, int]:
    """The span from `start` to `end` made `length` long to both sides, and moved into 0..limit, or cut to it."""
    more = int(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    if end >= limit:
        start, end = start - (end - limit), limit
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)
