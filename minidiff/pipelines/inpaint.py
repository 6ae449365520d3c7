"""Stable Diffusion: a part of a picture drawn anew, where a mask is white.

A UNet of 9 channels was trained for it: beside the latents it sees the mask and the latents of the picture without
the part. Any other UNet (4 channels) can do it too: after each step all but the part is replaced by the picture,
noised to the same level (RePaint, arXiv 2201.09865, eq. 8, without its jumps back).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..image_processor import PipelineImageInput, VaeImageProcessor
from ..noise import Generators
from .base import DiffusionPipeline
from .denoise import Callback, Tensors, denoise, plan, start_midway
from .latents import PLAIN, LatentsAs, check_pictures, encode_pictures, first_noise, repeated
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call

Prepared = tuple[Tensor, Tensor, Tensor]


class Inpainting(StableDiffusion):
    """What inpainting pipelines share: for UNets that see the mask beside the latents, and for those that don't."""

    beside = (5, 0)
    encode_as: ClassVar[LatentsAs] = PLAIN

    def _prepare(self) -> None:
        super()._prepare()
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def _sees_text_alone(self) -> bool:
        return self.unet.config.in_channels == self.vae.config.latent_channels

    def draw_part(
        self,
        tensors: Tensors,
        timesteps: Tensor,
        pictures: Prepared,
        B: int,
        start: Literal["noise", "noised picture", "picture"],
        latents: Tensor | None,
        generator: Generators,
        options: dict[str, Any],
    ) -> Tensor:
        """The loop, for B pictures. It starts with noise (or the `latents` given), or with what `pictures` are."""
        (picture, mask, masked), device, dtype = pictures, self._execution_device, self.unet.dtype
        keeps, scheduler, x0 = self._sees_text_alone(), self.scheduler, None
        if keeps or start != "noise":
            x0 = repeated("image", encode_pictures(self.vae, picture, generator, device, self.encode_as), B).to(dtype)
        shape = (B, self.vae.config.latent_channels, *mask.shape[2:])
        noise = first_noise(shape, generator, latents if start == "noise" else None, device, dtype)
        if start == "noise":
            tensors["latents"] = noise * scheduler.init_noise_sigma
        else:
            tensors["latents"] = x0 if start == "picture" else scheduler.add_noise(x0, noise, timesteps[:1])
        masked = repeated("image", encode_pictures(self.vae, masked, generator, device, self.encode_as), B)
        mask = repeated("mask_image", mask, B)
        twice = 2 if self.do_classifier_free_guidance else 1
        tensors["mask"] = torch.cat([mask.to(device, dtype)] * twice)
        tensors["masked_image_latents"] = torch.cat([masked.to(device, dtype)] * twice)

        def beside(tensors: Tensors) -> list[Tensor]:
            return [tensors["mask"], tensors["masked_image_latents"]]

        def keep(i: int, latents: Tensor) -> Tensor:
            mask = tensors["mask"][: len(latents)]
            last = i + 1 == len(timesteps)
            known = x0 if last else scheduler.add_noise(x0, noise, timesteps[i + 1 : i + 2])
            return (1 - mask) * known + mask * latents

        return denoise(self, tensors, timesteps, **({"after": keep} if keeps else {"beside": beside}), **options)

    def _crop(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        height: int,
        width: int,
        padding: int | None,
        output_type: str,
    ) -> tuple[int, int, int, int] | None:
        """The box (left, top, right, bottom) that `padding_mask_crop` means, or None."""
        if padding is None:
            return None
        for name, value in (("image", image), ("mask_image", mask_image)):
            if not isinstance(value, Image.Image):
                raise ValueError(f"{name} must be a PIL image for padding_mask_crop, but is a {type(value).__name__}")
        if output_type != "pil":
            raise ValueError(f'output_type={output_type!r} must be "pil" for padding_mask_crop')
        if image.size != mask_image.size:
            raise ValueError(f"mask_image is {mask_image.size}, image {image.size}: they must agree to be cropped")
        if as_integer(padding, "padding_mask_crop") < 0:
            raise ValueError(f"padding_mask_crop={padding} must be 0 or more")
        return self.mask_processor.get_crop_region(mask_image, width, height, int(padding))

    def _pictures(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        masked_image_latents: Tensor | None,
        height: int,
        width: int,
        crop: tuple[int, int, int, int] | None,
    ) -> Prepared:
        """As tensors: the picture, the mask (n, 1, h, w) at the latents' size, and the picture without the part."""
        options = {"resize_mode": "default" if crop is None else "fill", "crops_coords": crop}
        picture = self.image_processor.preprocess(image, height, width, **options)
        picture = check_pictures("image", image, picture, self.vae)
        mask = self.mask_processor.preprocess(mask_image, height, width, **options)
        latent, size = self.vae.config.latent_channels, (height // self.vae.factor, width // self.vae.factor)
        if mask.shape[1] != 1:
            raise ValueError(f"mask_image has shape {tuple(mask.shape)} as a tensor; it must have one channel")
        if picture.shape[1] == latent and picture.shape[2:] != size:
            raise ValueError(f"image are latents of shape {tuple(picture.shape)}; height and width need {size}")
        if masked_image_latents is not None:
            check_tensors(masked_image_latents=masked_image_latents)
            shape = masked_image_latents.shape
            if len(shape) != 4 or shape[1:] != (latent, *size):
                raise ValueError(f"masked_image_latents has shape {tuple(shape)}, but must have (n, {latent}, *{size})")
            masked = masked_image_latents
        elif picture.shape[1] == latent and self._sees_text_alone():
            masked = picture  # nothing reads it
        elif picture.shape[1] == latent:
            raise ValueError("image are latents, which can't be masked here: give masked_image_latents too")
        elif len(picture) != len(mask) and 1 not in (len(picture), len(mask)):
            raise ValueError(f"mask_image holds {len(mask)} masks for {len(picture)} pictures: give one, or one each")
        else:
            masked = picture.float() * (mask < 0.5)
        return picture.float(), F.interpolate(mask, size), masked

    def put_back(self, result: Any, image: Any, mask_image: Any, crop: tuple[int, int, int, int] | None) -> Any:
        """A call's result, its pictures in their place in `image` where they were drawn for a `crop` of it."""
        if crop is not None:
            result[0][:] = [self.image_processor.apply_overlay(mask_image, image, one, crop) for one in result[0]]
        return result


class StableDiffusionInpaintPipeline(Inpainting):
    """SD 1.x and 2.x, with a UNet of 9 or 4 channels."""

    _callback_tensor_inputs = (*StableDiffusion._callback_tensor_inputs, "mask", "masked_image_latents")
    scheduler_mends = (("steps_offset", 1), ("skip_prk_steps", True))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt, `image` where `mask_image` is black.

        Args:
            image, mask_image: a picture or a list of them (see `VaeImageProcessor.preprocess`); fewer than there are
                pictures to draw are repeated in turn. They are made `height` x `width`. `image` may be latents, if
                `masked_image_latents` is given.
            masked_image_latents: (n, 4, h, w), what else is made of `image` and the mask.
            padding_mask_crop: draws only what is around the mask, and this many pixels more, at the full size, and
                puts it back in its place. For one PIL image and mask.
            strength: how much of the run is made, 0 to 1; below 1 the part begins with what was there.

        The other arguments are those of `StableDiffusionPipeline`, and so are the errors.
        """
        count = check_call(
            output_type,
            num_images_per_prompt,
            guidance_scale,
            eta,
            cross_attention_kwargs=cross_attention_kwargs,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
        )
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        height, width = self.size(height, width)
        crop = self._crop(image, mask_image, height, width, padding_mask_crop, output_type)
        pictures = self._pictures(image, mask_image, masked_image_latents, height, width, crop)
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            timesteps = start_midway(run.scheduler, timesteps, strength, at_least=1)
            tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            start = "noise" if strength == 1 or latents is not None else "noised picture"
            options = {"told": run.told, "callback": on_step, "eta": eta, "generator": generator}
            latents = run.draw_part(tensors, timesteps, pictures, B, start, latents, generator, options)
            result = run.finish(latents, output_type, return_dict)
        return self.put_back(result, image, mask_image, crop)
