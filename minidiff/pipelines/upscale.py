"""Stable Diffusion x4: a small picture and a text to one of four times its height and width.

The UNet sees the small picture, noised a little, beside the latents, which are of the small picture's size: its VAE has
one level less. How much the picture was noised is the UNet's class (Cascaded diffusion models, arXiv 2106.15282, 4.2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import as_integer
from ..image_processor import PipelineImageInput, VaeImageProcessor
from ..models import AutoencoderKL, CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from ..noise import Generators, randn_tensor
from ..schedulers.base import Sampler
from .denoise import Callback, Tensors, denoise, plan
from .latents import check_generators, first_latents
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput, check_call


class StableDiffusionUpscalePipeline(StableDiffusion):
    """A UNet of 7 channels: the latents, and the small picture.

    `low_res_scheduler` noises the small picture, `max_noise_level` of its timesteps at most. A `safety_checker` answers
    with pictures, flags, and flags of watermarks; a `watermarker` has `apply_watermark`.
    """

    setting_names = ("max_noise_level",)
    beside = (3,)
    scheduler_mends = ()
    mends_sample_size = False

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        low_res_scheduler: Sampler,
        scheduler: Sampler,
        safety_checker: object | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        watermarker: object | None = None,
        max_noise_level: int = 350,
    ):
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            low_res_scheduler=low_res_scheduler,
            scheduler=scheduler,
            safety_checker=safety_checker,
            watermarker=watermarker,
            feature_extractor=feature_extractor,
        )
        self._prepare()
        self.max_noise_level = max_noise_level
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, resample="bicubic")
        if vae.config.scaling_factor != 0.08333:  # which folders of 2022 don't say; the reference mends it always
            vae.config = type(vae.config).read({**vae.config.explicit(), "scaling_factor": 0.08333})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt, of four times the size of `image`.

        Args:
            image: a picture for each prompt (see `VaeImageProcessor.preprocess`).
            noise_level: the timestep to which `image` is noised, 0 to `max_noise_level`: more invents more.

        The other arguments are those of `StableDiffusionPipeline`, and so are the errors.
        """
        count = check_call(
            output_type, num_images_per_prompt, guidance_scale, eta, cross_attention_kwargs=cross_attention_kwargs
        )
        on_step = Callback(None, (), (), callback, callback_steps)
        if not 0 <= as_integer(noise_level, "noise_level") <= self.max_noise_level:
            raise ValueError(f"noise_level={noise_level} must lie in 0..{self.max_noise_level}, the max_noise_level")
        pictures = self.image_processor.preprocess(image)
        channels = self.unet.config.in_channels - self.vae.config.latent_channels
        if pictures.shape[1] != channels:
            raise ValueError(f"image has shape {tuple(pictures.shape)} as a tensor; it must have {channels} channels")
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            device, dtype = run._execution_device, run.unet.dtype
            if len(pictures) * count != B:
                raise ValueError(f"image holds {len(pictures)} for {B // count} prompts: give one for each")
            check_generators(generator, len(pictures))
            level = torch.tensor([noise_level])
            noise = randn_tensor(pictures.shape, generator, device, dtype)
            noised = run.low_res_scheduler.add_noise(pictures.to(device, dtype), noise, level)
            # A prompt's pictures stand side by side, so right would be repeat_interleave; the reference repeats the
            # list as a whole, and with several prompts and several pictures each draws from another's picture
            noised = noised.repeat(count * (2 if run.do_classifier_free_guidance else 1), 1, 1, 1)
            labels = level.to(device).expand(len(noised))
            shape = (B, run.vae.config.latent_channels, *pictures.shape[2:])
            tensors["latents"] = first_latents(shape, generator, latents, device, dtype, run.scheduler.init_noise_sigma)

            def told(tensors: Tensors, x: Tensor, t: Tensor) -> dict[str, Tensor]:
                return {"encoder_hidden_states": tensors["prompt_embeds"], "class_labels": labels}

            options = {"callback": on_step, "eta": eta, "generator": generator}
            latents = denoise(run, tensors, timesteps, told=told, beside=lambda tensors: [noised], **options)
            result = run.finish(latents, output_type, return_dict)
        if output_type == "pil" and self.watermarker is not None:
            result[0][:] = self.watermarker.apply_watermark(result[0])
        return result

    def run_safety_checker(
        self, image: Tensor, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Tensor, list[bool] | None]:
        found = super().run_safety_checker(image, device, dtype)
        return found[0], found[1]
