"""Stable Diffusion XL: a part of a picture drawn anew, where a mask is white."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..image_processor import PipelineImageInput
from ..noise import Generators
from .base import DiffusionPipeline
from .denoise import Callback, plan
from .inpaint import Inpainting
from .latents import LatentsAs
from .stable_diffusion import check_call
from .stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLPipelineOutput
from .xl_image_to_image import StableDiffusionXLOnPictures


class StableDiffusionXLInpaintPipeline(StableDiffusionXLOnPictures, Inpainting):
    """XL's base model, its refiner, or an inpainting model: a UNet of 9 or 4 channels."""

    _callback_tensor_inputs = (*StableDiffusionXL._callback_tensor_inputs, "mask", "masked_image_latents")
    # The reference leaves `latents_mean` and `latents_std` out here, though it reads them when it decodes: for the few
    # VAEs that have them (Playground 2.5), the kept part of the picture is wrong
    encode_as = LatentsAs(upcast=True)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt, `image` where `mask_image` is black.

        `image`, `mask_image`, `masked_image_latents`, `padding_mask_crop` and `strength` are those of
        `StableDiffusionInpaintPipeline`, the others those of `StableDiffusionXLImg2ImgPipeline`, and so are the
        errors. With `denoising_start` the loop starts with `image`, and reads no `latents`.
        """
        count = check_call(
            output_type,
            num_images_per_prompt,
            guidance_scale,
            eta,
            guidance_rescale=guidance_rescale,
            cross_attention_kwargs=cross_attention_kwargs,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
        )
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        height, width = self.size(height, width)
        crop = self._crop(image, mask_image, height, width, padding_mask_crop, output_type)
        pictures = self._pictures(image, mask_image, masked_image_latents, height, width, crop)
        texts = (prompt, prompt_2, negative_prompt, negative_prompt_2)
        states = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        settings = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip}
        parts = {"denoising_start": denoising_start, "denoising_end": denoising_end}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs, **parts) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            timesteps = run.part(timesteps, strength, denoising_start, denoising_end, at_least=1)
            tensors, B = run.text_tensors(texts, states, count)
            tensors["add_time_ids"] = run.sizes(
                (B, height, width),
                (original_size, negative_original_size),
                (crops_coords_top_left, negative_crops_coords_top_left),
                (target_size, negative_target_size),
                (aesthetic_score, negative_aesthetic_score),
            )
            start = "noise" if strength == 1 or latents is not None else "noised picture"
            start = start if denoising_start is None else "picture"
            options = {"told": run.told, "callback": on_step, "eta": eta, "generator": generator}
            latents = run.draw_part(tensors, timesteps, pictures, B, start, latents, generator, options)
            result = run.finish(latents, output_type, return_dict)
        return self.put_back(result, image, mask_image, crop)
