"""Latent consistency models (arXiv 2310.04378): Stable Diffusion in one to eight steps, from text or a picture.

The UNet was distilled to see where the path of a guided run ends, and is told the guidance scale, so that one pass is
a whole step. What the last step says of the path's end is the picture: "denoised" among the tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..image_processor import PipelineImageInput
from ..noise import Generators, randn_tensor
from ..schedulers import LCMScheduler
from .base import DiffusionPipeline
from .denoise import Callback, Tensors, denoise, plan
from .latents import check_pictures, first_latents, first_noise, picture_latents
from .prompt import read_text
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class LatentConsistency(StableDiffusion):
    """Base of both pipelines."""

    _callback_tensor_inputs = ("latents", "denoised", "prompt_embeds", "w_embedding")
    scheduler_mends = ()

    def _prepare(self) -> None:
        super()._prepare()
        if self.unet.config.time_cond_proj_dim is None:
            raise ValueError(
                "unet has no time_cond_proj_dim, so it can't be told the guidance scale: StableDiffusionPipeline with"
                " an LCMScheduler draws with it"
            )
        if not isinstance(self.scheduler, LCMScheduler):
            raise ValueError(f"scheduler must be an LCMScheduler, but is a {type(self.scheduler).__name__}")

    def jump(self, tensors: Tensors, timesteps: Tensor, callback: Callback, generator: Generators) -> Tensor:
        """The loop, with the path's end as its result."""
        tensors["denoised"] = tensors["latents"]
        denoise(self, tensors, timesteps, told=read_text, callback=callback, generator=generator)
        return tensors["denoised"]


class LatentConsistencyModelPipeline(LatentConsistency):
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
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
        """Draws `num_images_per_prompt` pictures for each prompt.

        `original_inference_steps`: how many of the training's timesteps the distillation used; by default the
        scheduler's. The other arguments are those of `StableDiffusionPipeline`, and so are the errors.
        """
        count = check_call(
            output_type,
            num_images_per_prompt,
            guidance_scale,
            cross_attention_kwargs=cross_attention_kwargs,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
        )
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        height, width = self.size(height, width)
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            distilled = {"original_inference_steps": original_inference_steps}
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, None, **distilled)
            tensors, B = run.text_tensors(prompt, count, None, prompt_embeds, None)
            factor, device, dtype = run.vae.factor, run._execution_device, run.unet.dtype
            shape = (B, run.unet.config.in_channels, height // factor, width // factor)
            sigma = run.scheduler.init_noise_sigma
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, sigma)
            return run.finish(run.jump(tensors, timesteps, on_step, generator), output_type, return_dict)


class LatentConsistencyModelImg2ImgPipeline(LatentConsistency):
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
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
        """Draws `num_images_per_prompt` pictures for each prompt, of the size of `image`, made a multiple of 8.

        `image` as in `StableDiffusionImg2ImgPipeline`. `strength` is the share of the training's timesteps that the
        steps are chosen from: their number stays. `latents`: in place of what would be made of `image`, already at the
        noise of the first step. The other arguments are those of `LatentConsistencyModelPipeline`.
        """
        count = check_call(
            output_type,
            num_images_per_prompt,
            guidance_scale,
            cross_attention_kwargs=cross_attention_kwargs,
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
        )
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        pictures = check_pictures("image", image, self.image_processor.preprocess(image), self.vae)
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            distilled = {"original_inference_steps": original_inference_steps, "strength": strength}
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, None, **distilled)
            tensors, B = run.text_tensors(prompt, count, None, prompt_embeds, None)
            device, dtype = run._execution_device, run.unet.dtype
            if latents is None:
                x0 = picture_latents(run.vae, pictures, B, generator, device, dtype)
                noise = randn_tensor(x0.shape, generator, device, dtype)
                tensors["latents"] = run.scheduler.add_noise(x0, noise, timesteps[:1])
            else:
                tensors["latents"] = first_noise((B, *latents.shape[1:]), generator, latents, device, dtype)
            return run.finish(run.jump(tensors, timesteps, on_step, generator), output_type, return_dict)
