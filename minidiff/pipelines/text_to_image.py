"""Stable Diffusion: text to a picture (High-resolution image synthesis with latent diffusion models, arXiv 2112.10752).

prompt -> token ids -> text states -> for each timestep: predicted noise, guided, one scheduler step -> VAE -> picture
"""

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import check_output_type, to_output
from ..loading.component import check_tensors
from ..models import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel
from ..noise import Generators, randn_tensor
from ..schedulers.base import Scheduler, check_number
from .base import DiffusionPipeline, check_finite

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class StableDiffusionPipelineOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says. `nsfw_content_detected`: a bool
    for each picture, or None where no safety checker looked."""

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None


def guide(uncond: Tensor, text: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6, with its w + 1 as `guidance_scale`): away from the
    prediction without the text. `guidance_rescale` takes back the contrast that it adds (arXiv 2305.08891, eq. 15-16).
    """
    eps = uncond + guidance_scale * (text - uncond)
    if guidance_rescale > 0:
        dims = tuple(range(1, eps.ndim))
        rescaled = eps * (text.std(dims, keepdim=True) / eps.std(dims, keepdim=True))
        eps = guidance_rescale * rescaled + (1 - guidance_rescale) * eps
    return eps


class StableDiffusionPipeline(DiffusionPipeline):
    """SD 1.x and 2.x. `scheduler` can be any of minidiff's, and be swapped between calls."""

    setting_names = ("requires_safety_checker",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
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
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[["StableDiffusionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws `num_images_per_prompt` pictures for each prompt; B is their number in all.

        Args:
            prompt, negative_prompt: a text or a list of them; or, in their place, `prompt_embeds` and
                `negative_prompt_embeds` (prompts, L, hidden_size).
            height, width: in pixels, multiples of 8; by default what the UNet was trained at.
            num_inference_steps: 1 to num_train_timesteps; `timesteps` names them one by one where the scheduler can.
            guidance_scale: how far to follow the prompt; no unconditional pass is made at 1 or below.
            guidance_rescale: see `guide`.
            eta: DDIM's, 0 to 1; other schedulers don't read it.
            generator: one for all pictures, or one for each. A CPU generator draws on the CPU whatever the device.
            latents: the first noise (B, 4, height / 8, width / 8), instead of drawing it.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; "pt", (B, 3, H, W) in [0, 1]; or "latent".
            clip_skip: leave out this many of the text encoder's last layers.
            callback_on_step_end: called as f(pipe, i, t, tensors) after each step with the tensors named in
                `callback_on_step_end_tensor_inputs`; what it returns under these names is taken over.

        Raises ValueError or TypeError, naming the argument, before anything is computed; FloatingPointError, naming
        the step, if the latents don't stay finite.
        """
        sample_size = self.unet.config.sample_size or 64
        default = sample_size if isinstance(sample_size, tuple) else (sample_size, sample_size)
        height = default[0] * self.vae.factor if height is None else height
        width = default[1] * self.vae.factor if width is None else width
        check_output_type(output_type)
        self._check_numbers(height, width, num_images_per_prompt, clip_skip)
        check_number(guidance_scale, "guidance_scale")
        check_number(guidance_rescale, "guidance_rescale")
        named = callback_on_step_end_tensor_inputs
        if not isinstance(named, list | tuple) or not set(map(str, named)) <= set(CALLBACK_TENSORS):
            raise ValueError(f"callback_on_step_end_tensor_inputs={named!r} must be a list of {CALLBACK_TENSORS}")
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise TypeError(f"callback_on_step_end must be a function, not {callback_on_step_end!r}")
        guided = guidance_scale > 1

        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps)
        else:
            self._set_custom_timesteps(timesteps)

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, num_images_per_prompt, guided, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip
        )
        states = torch.cat([negative_prompt_embeds, prompt_embeds]) if guided else prompt_embeds  # (2B or B, L, C)

        shape = (len(prompt_embeds), self.unet.config.in_channels, height // self.vae.factor, width // self.vae.factor)
        latents = self._first_latents(shape, generator, latents, prompt_embeds.dtype)

        takes = inspect.signature(self.scheduler.step).parameters  # DDIM's takes both, DDPM's a generator, PNDM's none
        options = {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in takes}
        timesteps, finite = self.scheduler.timesteps.tolist(), []
        for i, t in enumerate(self.progress_bar(timesteps)):
            twice = torch.cat([latents] * 2) if guided else latents
            eps = self.unet(self.scheduler.scale_model_input(twice, t), t, states).sample
            if guided:
                eps = guide(*eps.chunk(2), guidance_scale, guidance_rescale)
            latents = self.scheduler.step(eps, t, latents, **options).prev_sample
            if callback_on_step_end is not None:
                now = {"latents": latents, "prompt_embeds": states, "negative_prompt_embeds": negative_prompt_embeds}
                named = {name: now[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, i, t, named) or {}
                latents, states = changed.get("latents", latents), changed.get("prompt_embeds", states)
            finite.append(latents.isfinite().all())
        check_finite(finite, timesteps)

        if output_type == "latent":
            images = latents
        else:
            images = to_output(self.vae.decode(latents / self.vae.config.scaling_factor).sample, output_type)
        output = StableDiffusionPipelineOutput(images, None)
        return output if return_dict else tuple(output)

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states for the prompt and, with guidance, for its negative: (B, L, hidden_size) each, else None."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, and not both")
        given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        check_tensors(**{name: value for name, value in given.items() if value is not None})
        count = len(prompt_embeds) if prompt is None else len(_texts("prompt", prompt))
        negatives = _texts("negative_prompt", negative_prompt or "")
        negatives = negatives * count if len(negatives) == 1 else negatives
        if len(negatives) != count:
            raise ValueError(f"negative_prompt has {len(negatives)} texts for {count} prompts")

        if prompt_embeds is None:
            prompt_embeds = self._encode(_texts("prompt", prompt), clip_skip)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_prompt_embeds = self._encode(negatives, None, length=prompt_embeds.shape[1])
        if do_classifier_free_guidance and negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"negative_prompt_embeds has shape {tuple(negative_prompt_embeds.shape)},"
                f" prompt_embeds {tuple(prompt_embeds.shape)}: they must agree"
            )

        def repeat(states: Tensor) -> Tensor:
            states = states.to(self.unet.device, self.unet.dtype)
            return states.repeat_interleave(num_images_per_prompt, dim=0)

        return repeat(prompt_embeds), repeat(negative_prompt_embeds) if do_classifier_free_guidance else None

    def _encode(self, texts: list[str], clip_skip: int | None, length: int | None = None) -> Tensor:
        """(texts, L, hidden_size); texts are cut or padded to `length` tokens, by default the tokenizer's."""
        length = length or self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for row in self.tokenizer(texts).input_ids:
            if len(row) > length:
                lost = self.tokenizer.decode(row[length - 1 : -1])
                warnings.warn(f"prompt is longer than {length} tokens; left out: {lost!r}", stacklevel=4)
        ids = ids.input_ids.to(self.text_encoder.device)
        if clip_skip is None:
            return self.text_encoder(ids).last_hidden_state
        # The last norm is applied to whichever layer's states are taken: the UNet was trained on normed states
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        return self.text_encoder.final_layer_norm(states[-(clip_skip + 1)])

    def _first_latents(
        self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(generator, list | tuple) and len(generator) != shape[0]:
            raise ValueError(f"generator has {len(generator)} entries for {shape[0]} pictures: give one, or one each")
        if latents is None:
            latents = randn_tensor(shape, generator, self.unet.device, dtype)
        check_tensors(latents=latents)
        if latents.shape != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; these arguments need {shape}")
        return latents.to(self.unet.device) * self.scheduler.init_noise_sigma

    def _set_custom_timesteps(self, timesteps: list[int]) -> None:
        try:
            self.scheduler.set_timesteps(timesteps=timesteps)
        except TypeError as error:
            name = type(self.scheduler).__name__
            raise ValueError(f"timesteps was given, which {name} doesn't take ({error})") from None

    def _check_numbers(self, height: int, width: int, num_images_per_prompt: int, clip_skip: int | None) -> None:
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int) or value <= 0 or value % 8:
                raise ValueError(f"{name}={value!r} must be a positive multiple of 8")
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r} must be a positive integer")
        if clip_skip is not None:
            layers = self.text_encoder.config.num_hidden_layers
            if not isinstance(clip_skip, int) or not 0 <= clip_skip <= layers:
                raise ValueError(f"clip_skip={clip_skip!r} must be an integer from 0 to {layers}")


def _texts(name: str, value: str | list[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, not {value!r}")
    return list(texts)
