"""Stable Diffusion image variations: a picture in the place of the text. CLIP's image encoder says what it shows."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from ..models import (
    AutoencoderKL,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)
from ..noise import Generators
from ..schedulers.base import Sampler
from .denoise import Callback, denoise, plan
from .latents import first_latents
from .memory import device_of
from .prompt import read_text
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class StableDiffusionImageVariationPipeline(StableDiffusion):
    """A UNet that was trained on pictures' embeddings."""

    scheduler_mends = ()

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNet2DConditionModel,
        scheduler: Sampler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        requires_safety_checker: bool = True,
    ):
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self._prepare()
        self._require_safety_checker(requires_safety_checker)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | list[Image.Image] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures that show what `image` shows.

        Args:
            image: PIL, or a list of those; or a tensor as the image encoder reads it (see `CLIPImageProcessor`).

        The other arguments are those of `StableDiffusionPipeline`, and so are the errors.
        """
        count = check_call(output_type, num_images_per_prompt, guidance_scale, eta)
        on_step = Callback(None, (), (), callback, callback_steps)
        height, width = self.size(height, width)
        if not isinstance(image, Tensor) and self.feature_extractor is None:
            raise ValueError("image must be a tensor, since the pipeline has no feature_extractor")
        seen = image if isinstance(image, Tensor) else self.feature_extractor(image, return_tensors="pt").pixel_values
        with self.running(guidance_scale=guidance_scale) as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            device, dtype, factor = run._execution_device, run.unet.dtype, run.vae.factor
            seen = seen.to(device_of(run.image_encoder), run.image_encoder.dtype)
            states = run.image_encoder(seen).image_embeds[:, None].to(device, dtype)
            states = states.repeat_interleave(count, dim=0)  # (B, 1, C)
            guided = run.do_classifier_free_guidance
            tensors = {"prompt_embeds": torch.cat([torch.zeros_like(states), states]) if guided else states}
            shape = (len(states), run.unet.config.in_channels, height // factor, width // factor)
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, run.scheduler.init_noise_sigma)
            latents = denoise(run, tensors, timesteps, told=read_text, callback=on_step, eta=eta, generator=generator)
            return run.finish(latents, output_type, return_dict)
