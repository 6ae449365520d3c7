"""InstructPix2Pix: a picture edited as a text says (Brooks et al., arXiv 2211.09800).

The UNet sees the picture's latents beside the noisy ones, and is guided twice: to the text, and to the picture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import lora
from ..checks import check_number
from ..image_processor import PipelineImageInput
from ..noise import Generators
from .base import DiffusionPipeline
from .denoise import Callback, denoise, plan
from .latents import check_pictures, first_latents, repeated
from .memory import device_of
from .prompt import read_text
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class StableDiffusionInstructPix2PixPipeline(StableDiffusion):
    """A UNet of 8 channels: the latents, and those of the picture."""

    _callback_tensor_inputs = ("latents", "prompt_embeds", "image_latents")
    _image_guidance_scale = 1.5
    beside = (4,)
    scheduler_mends = ()
    mends_sample_size = False

    @property
    def image_guidance_scale(self) -> float:
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self._image_guidance_scale >= 1

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
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
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Edits `image`, `num_images_per_prompt` times for each prompt.

        Args:
            prompt: what to do to the picture.
            image: a picture or a list of them (see `VaeImageProcessor.preprocess`), or latents (n, 4, h, w) as the VAE
                makes them; fewer than there are pictures to draw are repeated in turn.
            image_guidance_scale: how far to keep to the picture. Nothing is guided below 1.

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
        check_number(image_guidance_scale, "image_guidance_scale")
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        pictures = check_pictures("image", image, self.image_processor.preprocess(image), self.vae)
        settings = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            with lora.scaled(1.0):  # as in the reference, the scale is the UNet's alone
                tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            guided, device, dtype = run.do_classifier_free_guidance, run._execution_device, run.unet.dtype
            if guided:
                uncond, text = tensors["prompt_embeds"].chunk(2)
                tensors["prompt_embeds"] = torch.cat([text, uncond, uncond])
            # The mode, not a sample, and without the VAE's scale: so the UNet was trained
            known_latents = pictures
            if pictures.shape[1] == run.vae.config.in_channels:
                known_latents = run.vae.encode(pictures.to(device_of(run.vae), run.vae.dtype)).latent_dist.mode()
            known_latents = repeated("image", known_latents, B).to(device, dtype)
            beside = [known_latents, known_latents, torch.zeros_like(known_latents)] if guided else [known_latents]
            tensors["image_latents"] = torch.cat(beside)
            shape, sigma = known_latents.shape, run.scheduler.init_noise_sigma
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, sigma)
            latents = denoise(
                run,
                tensors,
                timesteps,
                told=read_text,
                beside=lambda tensors: [tensors["image_latents"]],
                passes=3,
                combine=follow_text_and_picture,
                callback=on_step,
                eta=eta,
                generator=generator,
            )
            return run.finish(latents, output_type, return_dict)


def follow_text_and_picture(
    run: StableDiffusionInstructPix2PixPipeline, text: Tensor, picture: Tensor, uncond: Tensor
) -> Tensor:
    """arXiv 2211.09800, eq. 3: from nothing to the picture, and from the picture to picture and text."""
    to_text = run.guidance_scale * (text - picture)
    return uncond + to_text + run.image_guidance_scale * (picture - uncond)
