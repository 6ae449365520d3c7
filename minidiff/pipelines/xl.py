"""Stable Diffusion XL: text to image (SDXL, arXiv 2307.01952), and the first part of the work with a refiner."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise import Generators
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan, share, stop_at
from .latents import first_latents
from .stable_diffusion import check_call
from .stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLPipelineOutput, as_pair


class StableDiffusionXLPipeline(StableDiffusionXL):
    """XL's base model, and models distilled from it (turbo: guidance 0 and one step)."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt.

        Args:
            prompt_2, negative_prompt_2: for the second text encoder; by default the same texts.
            denoising_end: stops after this share of the noise (0 to 1) is gone; the refiner does the rest, from
                `output_type="latent"`.
            original_size, crops_coords_top_left, target_size: what the UNet is told of the picture (height, width;
                top, left): a small original looks blurred, a crop cuts. By default the picture's own size, uncropped.
            negative_original_size, negative_target_size: the same for the pass without the prompt, both or none.

        The other arguments are those of `StableDiffusionPipeline`, and so are the errors.
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
        share("denoising_end", denoising_end)
        height, width = self.size(height, width)
        numbers = (
            *as_pair("original_size", original_size, (height, width)),
            *as_pair("crops_coords_top_left", crops_coords_top_left, (0, 0)),
            *as_pair("target_size", target_size, (height, width)),
        )
        negative = numbers
        if negative_original_size is not None and negative_target_size is not None:
            negative = (
                *as_pair("negative_original_size", negative_original_size, (height, width)),
                *as_pair("negative_crops_coords_top_left", negative_crops_coords_top_left, (0, 0)),
                *as_pair("negative_target_size", negative_target_size, (height, width)),
            )
        elif negative_original_size or negative_target_size or negative_crops_coords_top_left not in ((0, 0), [0, 0]):
            names = "negative_original_size, negative_target_size and negative_crops_coords_top_left"
            warnings.warn(f"{names} have no effect without the first two", stacklevel=3)
        texts = (prompt, prompt_2, negative_prompt, negative_prompt_2)
        states = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        settings = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip}
        settings |= {"cross_attention_kwargs": cross_attention_kwargs, "denoising_end": denoising_end}
        with self.running(**settings) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            timesteps = stop_at(run.scheduler, timesteps, denoising_end)
            tensors, B = run.text_tensors(texts, states, count)
            tensors["add_time_ids"] = run.time_ids(B, numbers, negative)
            factor, device, dtype = run.vae.factor, run._execution_device, run.unet.dtype
            shape = (B, run.unet.config.in_channels, height // factor, width // factor)
            sigma = run.scheduler.init_noise_sigma
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, sigma)
            options = {"told": run.told, "callback": on_step, "eta": eta, "generator": generator}
            return run.finish(denoise(run, tensors, timesteps, **options), output_type, return_dict)
