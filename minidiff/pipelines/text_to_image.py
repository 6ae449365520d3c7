"""Stable Diffusion: text to a picture (High-resolution image synthesis with latent diffusion models, arXiv 2112.10752).

prompt -> token ids -> text states -> for each timestep: predicted noise, guided, one scheduler step -> VAE -> picture
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import check_output_type, to_output
from ..models import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from ..noise import Generators
from ..outputs import output
from ..schedulers.base import Sampler, as_integer, check_number
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan
from .latents import decode_latents, first_latents
from .prompt import encode_prompt

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@output
class StableDiffusionPipelineOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says. `nsfw_content_detected`: a bool
    for each picture, or None where no safety checker looked."""

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None


class StableDiffusionPipeline(DiffusionPipeline):
    """SD 1.x and 2.x. `scheduler` can be any of minidiff's, and be swapped between calls."""

    setting_names = ("requires_safety_checker",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Sampler,
        safety_checker: None = None,
        feature_extractor: None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ):
        optional = {
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
        }
        for name, part in optional.items():
            if part is not None:
                raise ValueError(f"{name} must be None: minidiff has none yet")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            **optional,
        )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"unet has {unet.config.in_channels} input channels, but the vae makes latents of"
                f" {vae.config.latent_channels}: a UNet with 9 is for inpainting (latents, mask, masked picture),"
                " which StableDiffusionPipeline doesn't do"
            )
        # Folders from 2022 lack two keys, whose defaults are wrong for Stable Diffusion: the reference mends them too
        mended = {}
        if scheduler.config.get("steps_offset", 1) != 1:
            mended["steps_offset"] = 1
        if scheduler.config.get("clip_sample", False):
            mended["clip_sample"] = False
        if mended:
            self.scheduler = type(scheduler).from_config({**scheduler.config.explicit(), **mended})
        self.requires_safety_checker = requires_safety_checker

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

        Raises ValueError or TypeError, naming the argument, before anything is computed; FloatingPointError, naming
        the step, if the latents don't stay finite.
        """
        check_output_type(output_type)
        check_number(guidance_scale, "guidance_scale")
        check_number(guidance_rescale, "guidance_rescale", least=0)
        check_number(eta, "eta", least=0)
        for name, value in (
            ("ip_adapter_image", ip_adapter_image),
            ("ip_adapter_image_embeds", ip_adapter_image_embeds),
        ):
            if value is not None:
                raise ValueError(f"{name} was given, but minidiff has no IP-Adapter: leave it out")
        if cross_attention_kwargs:
            raise ValueError("cross_attention_kwargs was given, but nothing here reads it: leave it out")
        on_step = Callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, CALLBACK_TENSORS, callback, callback_steps
        )
        count = as_integer(num_images_per_prompt, "num_images_per_prompt")
        if count < 1:
            raise ValueError(f"num_images_per_prompt={count} must be 1 or more")
        height, width = self._size(height, width)
        settings = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "clip_skip": clip_skip}
        with self.running(**settings) as run:
            timesteps = plan(run.scheduler, num_inference_steps, timesteps, sigmas)
            run._num_timesteps = len(timesteps)
            guided, device = run.do_classifier_free_guidance, run._execution_device
            if guidance_rescale and not guided:
                warnings.warn("guidance_rescale has no effect: guidance_scale is 1 or less", stacklevel=2)
            states, negative_states = run.encode_prompt(
                prompt,
                device,
                count,
                guided,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                clip_skip=clip_skip,
            )
            factor = run.vae.factor
            shape = (len(states), run.unet.config.in_channels, height // factor, width // factor)
            dtype, sigma = run.unet.dtype, run.scheduler.init_noise_sigma
            tensors = {
                "latents": first_latents(shape, generator, latents, device, dtype, sigma),
                "prompt_embeds": torch.cat([negative_states, states]) if guided else states,  # (2B or B, L, C)
                "negative_prompt_embeds": negative_states,
            }

            def told(tensors: dict[str, Tensor], x: Tensor, t: Tensor) -> dict[str, Tensor]:
                return {"encoder_hidden_states": tensors["prompt_embeds"]}

            latents = denoise(run, tensors, timesteps, told=told, callback=on_step, eta=eta, generator=generator)
            if output_type == "latent":
                images = latents
            else:
                images = to_output(decode_latents(run.vae, latents, device), output_type)
        result = StableDiffusionPipelineOutput(images, None)
        return result if return_dict else tuple(result)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states for the prompt and, with guidance, for its negative: (B, L, hidden_size) each, else None."""
        if lora_scale is not None:
            raise ValueError("lora_scale was given, but no LoRA is loaded: leave it out")
        return encode_prompt(
            self.tokenizer,
            self.text_encoder,
            torch.device(device or self._execution_device),
            self.unet.dtype,
            prompt,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
        )

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Of the pictures, in pixels."""
        factor, trained = self.vae.factor, self.unet.config.sample_size or 64
        trained = trained if isinstance(trained, tuple) else (trained, trained)
        sizes = []
        for name, value, default in (("height", height, trained[0]), ("width", width, trained[1])):
            size = default * factor if value is None else as_integer(value, name)
            if size <= 0 or size % factor:
                raise ValueError(f"{name}={size} must be a positive multiple of {factor}")
            sizes.append(size)
        return sizes[0], sizes[1]
