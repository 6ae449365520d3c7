"""Stable Diffusion with depth: image to image that keeps how far each thing is away.

The UNet sees a depth map beside the latents, -1 where the picture is farthest and 1 where it is nearest, as MiDaS says.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensors
from ..image_processor import PipelineImageInput
from ..models import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from ..noise import Generators, randn_tensor
from ..schedulers.base import Sampler
from .base import DiffusionPipeline, ImageOutput
from .denoise import Callback, denoise, plan, start_midway
from .latents import check_pictures, picture_latents, repeated
from .memory import device_of
from .prompt import read_text
from .stable_diffusion import StableDiffusion, check_call


class StableDiffusionDepth2ImgPipeline(StableDiffusion):
    """A UNet of 5 channels: the latents, and a depth map.

    `depth_estimator` and its `feature_extractor` (transformers' DPTForDepthEstimation and DPTImageProcessor, say) are
    the user's: minidiff has none. Without them a call needs a `depth_map`.
    """

    setting_names = ()
    _callback_tensor_inputs = (*StableDiffusion._callback_tensor_inputs, "depth_mask")
    beside = (1,)
    scheduler_mends = ()

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Sampler,
        depth_estimator: object | None = None,
        feature_extractor: object | None = None,
    ):
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            depth_estimator=depth_estimator,
            feature_extractor=feature_extractor,
        )
        self._prepare()

    safety_checker = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        depth_map: Tensor | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int | None = None,
    ) -> ImageOutput | tuple:
        """As `StableDiffusionImg2ImgPipeline`'s, with one argument more.

        Args:
            depth_map: (n, h, w), of any size and scale, larger where nearer; else the depth estimator makes it.
        """
        count = check_call(
            output_type, num_images_per_prompt, guidance_scale, eta, cross_attention_kwargs=cross_attention_kwargs
        )
        named, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        on_step = Callback(callback_on_step_end, named, known, callback, callback_steps)
        pictures = check_pictures("image", image, self.image_processor.preprocess(image), self.vae)
        settings = {"guidance_scale": guidance_scale, "clip_skip": clip_skip}
        with self.running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            timesteps = start_midway(run.scheduler, timesteps, strength)
            tensors, B = run.text_tensors(prompt, count, negative_prompt, prompt_embeds, negative_prompt_embeds)
            device, dtype = run._execution_device, run.unet.dtype
            depth = run.estimate_depth(image, device, dtype) if depth_map is None else depth_map
            factor = 1 if pictures.shape[1] == run.vae.config.latent_channels else run.vae.factor
            height, width = (side // factor for side in pictures.shape[2:])
            depth = repeated("depth_map", as_mask(depth, height, width, device, dtype), B)
            tensors["depth_mask"] = torch.cat([depth] * (2 if run.do_classifier_free_guidance else 1))
            x0 = picture_latents(run.vae, pictures, B, generator, device, dtype)
            noise = randn_tensor(x0.shape, generator, device, dtype)
            tensors["latents"] = run.scheduler.add_noise(x0, noise, timesteps[:1])
            latents = denoise(
                run,
                tensors,
                timesteps,
                told=read_text,
                beside=lambda tensors: [tensors["depth_mask"]],
                callback=on_step,
                eta=eta,
                generator=generator,
            )
            result = ImageOutput(run.finish(latents, output_type, return_dict=False)[0])
        return result if return_dict else tuple(result)

    def estimate_depth(self, image: PipelineImageInput, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(n, h, w), as the depth estimator says."""
        if self.depth_estimator is None or self.feature_extractor is None:
            raise ValueError("depth_map must be given: the pipeline has no depth_estimator with a feature_extractor")
        images = list(image) if isinstance(image, list | tuple | Tensor) or hasattr(image, "shape") else [image]
        seen = self.feature_extractor(images=images, return_tensors="pt").pixel_values.to(
            device_of(self.depth_estimator, device), dtype
        )
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.depth_estimator(seen).predicted_depth.to(device)


def as_mask(depth_map: Tensor, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n, h, w) -> (n, 1, height, width), each from -1 to 1."""
    check_tensors(depth_map=depth_map)
    if depth_map.ndim != 3:
        raise ValueError(f"depth_map has shape {tuple(depth_map.shape)}; it must be (n, height, width)")
    depth = F.interpolate(depth_map[:, None].to(device, dtype), size=(height, width), mode="bicubic")
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    if (low == high).any():
        raise ValueError("depth_map is the same everywhere: there is nothing to keep to")
    return 2 * (depth - low) / (high - low) - 1
