"""What the pipelines of Stable Diffusion 1 and 2 share: the components, how a call begins, and how its pictures end.

A call of any of them: its arguments are checked, the timesteps laid (`plan`), the prompt encoded (`text_tensors`),
the first latents made; then comes THE loop (`denoise`), and the pictures (`finish`). What differs stands in each file.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import lora
from ..checks import as_integer, check_number
from ..image_processor import PipelineImageInput, VaeImageProcessor
from ..images import check_finite_pictures, check_output_type, to_pil
from ..loading.config import Config
from ..models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)
from ..outputs import output
from ..schedulers.base import Sampler
from .adapters import LoraSwitches
from .base import DiffusionPipeline
from .denoise import Tensors
from .latents import PLAIN, LatentsAs, check_pictures, decode_latents
from .memory import device_of
from .prompt import encode_prompt, guidance_waves, read_text
from .textual_inversion import TextualInversion

BESIDE = {  # channels beside the latents in a UNet's input: what they are, and whose they are
    0: ("text alone", "StableDiffusionPipeline"),
    1: ("a depth map", "StableDiffusionDepth2ImgPipeline"),
    3: ("the low-resolution picture", "StableDiffusionUpscalePipeline"),
    4: ("the picture to be edited", "StableDiffusionInstructPix2PixPipeline"),
    5: ("inpainting (mask, masked picture)", "StableDiffusionInpaintPipeline"),
}


@output
class StableDiffusionPipelineOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says. `nsfw_content_detected`: a bool
    for each picture, or None where no safety checker looked."""

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None


class StableDiffusion(LoraSwitches, TextualInversion, DiffusionPipeline):
    """Base of the pipelines. `scheduler` can be any of minidiff's, and be swapped between calls."""

    setting_names = ("requires_safety_checker",)
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")
    beside: ClassVar[tuple[int, ...]] = (0,)  # how many channels the UNet may have beside the latents
    latents_as: ClassVar[LatentsAs] = PLAIN
    # Folders from 2022 lack keys of the scheduler, or have them wrong for Stable Diffusion. The reference mends them
    # too. A scheduler that is set later is taken as it is
    scheduler_mends: ClassVar[tuple[tuple[str, Any], ...]] = (("steps_offset", 1), ("clip_sample", False))
    mends_sample_size: ClassVar[bool] = True

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Sampler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ):
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self._prepare()
        self._require_safety_checker(requires_safety_checker)

    def _require_safety_checker(self, required: bool) -> None:
        self.requires_safety_checker = required
        if self.safety_checker is None and required:
            warnings.warn(
                f"{type(self).__name__} has no safety checker. The licence of Stable Diffusion asks that services open"
                " to the public show no unfiltered pictures; requires_safety_checker=False ends this warning",
                stacklevel=3,
            )
        if self.safety_checker is not None and self.feature_extractor is None:
            raise ValueError("safety_checker needs a feature_extractor: give one, or safety_checker=None")

    def _prepare(self) -> None:
        """Checks that the components fit, and mends what folders from 2022 lack."""
        channels, latent = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels - latent not in self.beside:
            purpose, owner = BESIDE.get(channels - latent, ("another system", "none of minidiff's"))
            takes = " or ".join(str(latent + more) for more in self.beside)
            raise ValueError(
                f"unet has {channels} input channels, but {type(self).__name__} takes {takes}, since the vae makes"
                f" latents of {latent}: a UNet with {channels} is for {purpose}: {owner}"
            )
        config = self.scheduler.config
        if mended := {key: to for key, to in self.scheduler_mends if config.get(key, to) != to}:
            named = config.explicit() if isinstance(config, Config) else config  # the reference's has none
            self.scheduler = type(self.scheduler).from_config({**named, **mended})
        if self.mends_sample_size:
            mend_sample_size(self.unet)
        self.vae_scale_factor = self.vae.factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
        with lora.scaled(lora_scale):
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

    def text_tensors(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> tuple[Tensors, int]:
        """What the loop's `tensors` hold of a prompt, and the number of pictures B."""
        guided = self.do_classifier_free_guidance
        states, negative_states = self.encode_prompt(
            prompt,
            None,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip=self.clip_skip,
        )
        joined = torch.cat([negative_states, states]) if guided else states  # (2B or B, L, C)
        tensors = {"prompt_embeds": joined, "negative_prompt_embeds": negative_states}
        return tensors | self.scale_tensors(len(states)), len(states)

    def told(self, tensors: Tensors, x: Tensor, t: Tensor) -> dict[str, Any]:
        """What the UNet is told at a step."""
        return read_text(tensors, x, t)

    def read_pictures(self, image: PipelineImageInput) -> Tensor:
        """What a call begins with, as pictures (n, C, H, W) in [-1, 1]; or as latents, if it is a tensor of them."""
        return check_pictures("image", image, self.image_processor.preprocess(image), self.vae)

    def scale_tensors(self, B: int) -> Tensors:
        """The guidance scale for a UNet that was distilled to read it, (B, time_cond_proj_dim)."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return {}
        waves = guidance_waves(self.guidance_scale, dim).expand(B, -1)
        return {"w_embedding": waves.to(self._execution_device, self.unet.dtype)}

    @property
    def do_classifier_free_guidance(self) -> bool:
        return super().do_classifier_free_guidance and self.unet.config.time_cond_proj_dim is None

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Of the pictures, in pixels: as asked for, or as the UNet was trained."""
        factor, trained = self.vae.factor, self.unet.config.sample_size or 64
        trained = trained if isinstance(trained, tuple) else (trained, trained)
        sizes = []
        for name, value, default in (("height", height, trained[0]), ("width", width, trained[1])):
            size = default * factor if value is None else as_integer(value, name)
            if size <= 0 or size % factor:
                raise ValueError(f"{name}={size} must be a positive multiple of {factor}")
            sizes.append(size)
        return sizes[0], sizes[1]

    def run_safety_checker(
        self, image: Tensor | np.ndarray, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Tensor | np.ndarray, list[bool] | None]:
        """Pictures (B, C, H, W) in [-1, 1], or arrays (B, H, W, C) in [0, 1] -> the same with zeros for those that
        aren't safe, and a flag for each; None without a safety checker."""
        if self.safety_checker is None:
            return image, None
        pictures = self.image_processor.postprocess(image) if isinstance(image, Tensor) else to_pil(image)
        seen = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(
            device_of(self.safety_checker, torch.device(device))
        )
        dtype = getattr(self.safety_checker, "dtype", dtype)
        return self.safety_checker(images=image, clip_input=seen.to(dtype))

    def finish(
        self, latents: Tensor, output_type: str, return_dict: bool
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Latents -> what the call returns."""
        images, flags = latents, None
        if output_type != "latent":
            device = self._execution_device
            pictures = check_finite_pictures(decode_latents(self.vae, latents, device, self.latents_as))
            pictures, flags = self.run_safety_checker(pictures, device, self.unet.dtype)
            within = None if flags is None else [not flag for flag in flags]  # black ones are in [0, 1] already
            images = self.image_processor.postprocess(pictures, output_type, within)
        result = StableDiffusionPipelineOutput(images, flags)
        return result if return_dict else tuple(result)


def check_call(
    output_type: str,
    num_images_per_prompt: int,
    guidance_scale: float,
    eta: float = 0.0,
    *,
    guidance_rescale: float = 0.0,
    cross_attention_kwargs: Any = None,
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Any = None,
) -> int:
    """Checks what the calls have in common. Returns `num_images_per_prompt` as an integer."""
    check_output_type(output_type)
    check_number(guidance_scale, "guidance_scale")
    check_number(guidance_rescale, "guidance_rescale", least=0)
    check_number(eta, "eta", least=0)
    adapter = {"ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds}
    for name, value in adapter.items():
        if value is not None:
            raise ValueError(f"{name} was given, but minidiff has no IP-Adapter: leave it out")
    attention = {} if cross_attention_kwargs is None else cross_attention_kwargs
    if not isinstance(attention, Mapping) or attention.keys() - {"scale"}:
        raise ValueError(f'cross_attention_kwargs={attention!r:.100} may hold LoRA\'s scale alone: {{"scale": 0.5}}')
    check_number(attention.get("scale", 1.0), 'cross_attention_kwargs["scale"]')
    if guidance_rescale and guidance_scale <= 1:
        warnings.warn("guidance_rescale has no effect: guidance_scale is 1 or less", stacklevel=4)
    count = as_integer(num_images_per_prompt, "num_images_per_prompt")
    if count < 1:
        raise ValueError(f"num_images_per_prompt={count} must be 1 or more")
    return count


def mend_sample_size(unet: UNet2DConditionModel) -> None:
    """The UNets of 2022 were trained at 64, whatever their configs say: from diffusers 0.9 on they say it."""
    config, version = unet.config, getattr(unet.config, "version", "")  # somebody else's network has none
    old = re.match(r"(\d+)\.(\d+)", version)
    if old and (int(old[1]), int(old[2])) < (0, 9) and isinstance(config.sample_size, int) and config.sample_size < 64:
        unet.config = type(config).read({**config.explicit(), "sample_size": 64})
