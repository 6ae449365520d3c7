"""Stable Diffusion XL: a picture and a text to a picture; and the refiner, which ends what the base model began.

The refiner (SDXL, arXiv 2307.01952, 2.5) was trained on the lowest fifth of the noise. It takes what the base model
left, with `denoising_start`; or any picture, with a `strength`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..image_processor import PipelineImageInput
from ..models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from ..noise import Generators, randn_tensor
from ..schedulers.base import Scheduler
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan, share, start_at, start_midway, stop_at
from .latents import first_noise, picture_latents
from .stable_diffusion import check_call
from .stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLPipelineOutput, as_pair

Pair = tuple[int, int]


class StableDiffusionXLOnPictures(StableDiffusionXL):
    """Base of the pipelines that begin with a picture. `requires_aesthetics_score`: the UNet is the refiner's."""

    setting_names = ("requires_aesthetics_score", *StableDiffusionXL.setting_names)

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: None = None,
        feature_extractor: None = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        models = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler)
        self.requires_aesthetics_score = requires_aesthetics_score
        super().__init__(*models, image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker)

    def sizes(
        self,
        drawn: tuple[int, int, int],
        original: tuple[Pair | None, Pair | None],
        crops: tuple[Pair, Pair],
        target: tuple[Pair | None, Pair | None],
        scores: tuple[float, float],
    ) -> Tensor:
        """`time_ids` for (B, height, width); of each pair the first is for the prompt, the second for its negative."""
        B, *own = drawn
        sizes = as_pair("original_size", original[0], own), as_pair("target_size", target[0], own)
        negative = (
            as_pair("negative_original_size", original[1], sizes[0]),
            as_pair("negative_target_size", target[1], sizes[1]),
        )
        places = (
            as_pair("crops_coords_top_left", crops[0], (0, 0)),
            as_pair("negative_crops_coords_top_left", crops[1], (0, 0)),
        )
        for name, score in zip(("aesthetic_score", "negative_aesthetic_score"), scores, strict=True):
            check_number(score, name)
        if self.requires_aesthetics_score:
            rows = (*sizes[0], *places[0], scores[0]), (*negative[0], *places[1], scores[1])
        else:  # the reference reads the prompt's own crop for the negative: `negative_crops_...` would be right
            rows = (*sizes[0], *places[0], *sizes[1]), (*negative[0], *places[0], *negative[1])
        return self.time_ids(B, *rows)

    def part(
        self, timesteps: Tensor, strength: float, start: float | None, end: float | None, at_least: int = 0
    ) -> Tensor:
        """Of the grid, what this call does: from `strength` or `start` on, to `end`."""
        share("denoising_start", start), share("denoising_end", end)
        if start is not None and end is not None and start >= end:
            raise ValueError(f"denoising_start={start} must be less than denoising_end={end}")
        if start is None:
            timesteps = start_midway(self.scheduler, timesteps, strength, at_least)
        else:
            timesteps = start_at(self.scheduler, timesteps, start)
        return stop_at(self.scheduler, timesteps, end)


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLOnPictures):
    """XL's base model or its refiner."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
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
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt, of the size of `image`, made a multiple of 8.

        Args:
            image, strength: as in `StableDiffusionImg2ImgPipeline`.
            denoising_start: in place of `strength`: `image` is what a run with this `denoising_end` has left, and gets
                no noise.
            latents: in place of what would be made of `image`, already at the noise of the first step.
            aesthetic_score, negative_aesthetic_score: 1 to 10, for the refiner.

        The other arguments are those of `StableDiffusionXLPipeline`, and so are the errors.
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
        pictures = self.read_pictures(image)
        texts = (prompt, prompt_2, negative_prompt, negative_prompt_2)
        states = (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        settings = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip}
        parts = {"denoising_start": denoising_start, "denoising_end": denoising_end}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs, **parts) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            timesteps = run.part(timesteps, strength, denoising_start, denoising_end)
            tensors, B = run.text_tensors(texts, states, count)
            device, dtype = run._execution_device, run.unet.dtype
            if latents is None:
                latents = picture_latents(run.vae, pictures, B, generator, device, dtype, run.latents_as)
                if denoising_start is None:
                    noise = randn_tensor(latents.shape, generator, device, dtype)
                    latents = run.scheduler.add_noise(latents, noise, timesteps[:1])
            else:
                latents = first_noise((B, *latents.shape[1:]), generator, latents, device, dtype)
            tensors["latents"] = latents
            tensors["add_time_ids"] = run.sizes(
                (B, *(side * run.vae.factor for side in latents.shape[2:])),
                (original_size, negative_original_size),
                (crops_coords_top_left, negative_crops_coords_top_left),
                (target_size, negative_target_size),
                (aesthetic_score, negative_aesthetic_score),
            )
            options = {"told": run.told, "callback": on_step, "eta": eta, "generator": generator}
            return run.finish(denoise(run, tensors, timesteps, **options), output_type, return_dict)
