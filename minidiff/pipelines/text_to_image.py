"""Stable Diffusion: text to a picture (High-resolution image synthesis with latent diffusion models, arXiv 2112.10752).

prompt -> token ids -> text states -> for each timestep: predicted noise, guided, one scheduler step -> VAE -> picture
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..noise import Generators
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan
from .latents import first_latents
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class StableDiffusionPipeline(StableDiffusion):
    """SD 1.x and 2.x."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt; B is their number in all.

        Args:
            prompt, negative_prompt: a text or a list of them; or, in their place, `prompt_embeds` and
                `negative_prompt_embeds` (prompts, L, hidden_size).
            height, width: in pixels, multiples of the VAE's factor (8); by default what the UNet was trained at.
            num_inference_steps: 1 to num_train_timesteps; or `timesteps` or `sigmas` one by one, where the scheduler
                takes them.
            guidance_scale: how far to follow the prompt; no unconditional pass is made at 1 or below.
            guidance_rescale: see `guide`.
            eta: DDIM's, 0 to 1; other schedulers don't read it.
            generator: one for all pictures, or one for each. A CPU generator draws on the CPU whatever the device.
            latents: the first noise (B, 4, height / 8, width / 8), instead of drawing it.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent".
            clip_skip: leave out this many of the text encoder's last layers, for the prompt alone.
            callback_on_step_end: see `Callback`; `callback` and `callback_steps` are its older form.

        Raises ValueError or TypeError, naming the argument, before the first step (an `eta` that is too large: at that
        step); FloatingPointError, naming the step, if the latents don't stay finite.
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
        settings = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            factor = run.vae.factor
            shape = (B, run.unet.config.in_channels, height // factor, width // factor)
            device, dtype, sigma = run._execution_device, run.unet.dtype, run.scheduler.init_noise_sigma
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, sigma)
            latents = denoise(run, tensors, timesteps, told=run.told, callback=on_step, eta=eta, generator=generator)
            return run.finish(latents, output_type, return_dict)
