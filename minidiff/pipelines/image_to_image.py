"""Stable Diffusion: a picture and a text to a picture (SDEdit, arXiv 2108.01073).

The loop starts midway: the picture's latents are noised to the level of a later step, and denoised from there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..image_processor import PipelineImageInput
from ..noise import Generators, randn_tensor
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan, start_midway
from .latents import picture_latents
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class StableDiffusionImg2ImgPipeline(StableDiffusion):
    """SD 1.x and 2.x."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
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
        """Draws `num_images_per_prompt` pictures for each prompt, of the size of `image`, made a multiple of 8.

        Args:
            image: a picture or a list of them (see `VaeImageProcessor.preprocess`), or latents (n, 4, h, w); fewer
                than there are pictures to draw are repeated in turn.
            strength: how much of the run is made, 0 to 1: at 1 little of the picture is left.

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
        pictures = self.read_pictures(image)
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            timesteps = start_midway(run.scheduler, timesteps, strength)
            tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            tensors["latents"] = run.first_latents(pictures, B, timesteps[:1], generator)
            latents = denoise(run, tensors, timesteps, told=run.told, callback=on_step, eta=eta, generator=generator)
            return run.finish(latents, output_type, return_dict)

    def first_latents(self, pictures: Tensor, B: int, timestep: Tensor, generator: Generators) -> Tensor:
        """The pictures' latents, noised to the level of `timestep`: (B, C, H, W)."""
        device, dtype = self._execution_device, self.unet.dtype
        x0 = picture_latents(self.vae, pictures, B, generator, device, dtype)
        return self.scheduler.add_noise(x0, randn_tensor(x0.shape, generator, device, dtype), timestep)
