"""What the pipelines of Stable Diffusion XL share (SDXL, arXiv 2307.01952): two text encoders, and micro-conditioning.

The states of both encoders' last layers but one stand side by side; the second one's pooled state, and six numbers
(the size that the picture had, where it was cropped, the size to draw), join the timestep. The refiner was trained
with the second encoder alone, and with a score of how beautiful the picture is in place of the size to draw.
"""

import importlib.util
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import lora
from ..checks import check_tensors
from ..images import to_output
from ..models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)
from ..outputs import output
from ..schedulers.base import Scheduler
from .denoise import Tensors
from .latents import XL, decode_latents
from .memory import device_of
from .prompt import as_texts, check_clip_skip, read_text, token_ids
from .stable_diffusion import StableDiffusion

States = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # of the prompt, of its negative; pooled, and again

WATERMARK = 0b101100111110110010010000011110111011000110011110  # 48 bits that mark a picture as drawn by XL


@output
class StableDiffusionXLPipelineOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor, as `output_type` says."""

    images: list[Image.Image] | np.ndarray | Tensor


class StableDiffusionXL(StableDiffusion):
    """Base of the pipelines. `scheduler` can be any of minidiff's, and be swapped between calls."""

    setting_names = ("force_zeros_for_empty_prompt", "add_watermarker")
    _callback_tensor_inputs = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
    scheduler_mends = ()
    latents_as = XL
    requires_aesthetics_score = False

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: None = None,
        feature_extractor: None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        if unet.config.addition_embed_type != "text_time":
            raise ValueError(f"unet isn't XL's: its addition_embed_type is {unet.config.addition_embed_type!r}")
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.add_watermarker = add_watermarker
        if add_watermarker and importlib.util.find_spec("imwatermark") is None:
            raise ValueError("add_watermarker=True needs the package invisible-watermark: install it, or leave it out")
        self._prepare()

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> States:
        """States for the prompt and, with guidance, for its negative (B, L, n), else None; and both pooled (B, m).

        `prompt_2` and `negative_prompt_2` are for the second text encoder, by default the same texts. Without a
        `negative_prompt` the negatives are zeros, where `force_zeros_for_empty_prompt`.
        """
        device, guided = torch.device(device or self._execution_device), do_classifier_free_guidance
        _check_pairs("prompt", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, needed=True)
        pooled_negative = pooled_own = negative_pooled_prompt_embeds
        _check_pairs("negative_prompt", negative_prompt, negative_prompt_2, negative_prompt_embeds, pooled_negative)
        if not guided and (negative_prompt or negative_prompt_2 or negative_prompt_embeds is not None):
            warnings.warn("the negative prompt has no effect: guidance_scale is 1 or less", stacklevel=4)

        if clip_skip is not None and prompt_embeds is not None:
            warnings.warn("clip_skip has no effect beside prompt_embeds, which are taken as they are", stacklevel=4)
        states, pooled = prompt_embeds, pooled_prompt_embeds
        if prompt_embeds is None:
            states, own = self._encode(
                as_texts("prompt", prompt), prompt_2, "prompt_2", device, clip_skip, None, lora_scale
            )
            pooled = own if pooled is None else pooled
        negative, zeros = negative_prompt_embeds, negative_prompt is None and self.force_zeros_for_empty_prompt
        if guided and negative is None and zeros:
            negative, pooled_negative = torch.zeros_like(states), torch.zeros_like(pooled)
            alone = {"negative_prompt_2": negative_prompt_2, "negative_pooled_prompt_embeds": pooled_own}
            for name, value in alone.items():
                if value is not None:
                    warnings.warn(f"{name} has no effect without negative_prompt: zeros stand there", stacklevel=4)
        elif guided and negative is None:
            texts = as_texts("negative_prompt", negative_prompt or "")
            texts = texts * len(states) if len(texts) == 1 else texts
            if len(texts) != len(states):
                raise ValueError(f"negative_prompt has {len(texts)} texts for {len(states)} prompts")
            negative, own = self._encode(
                texts, negative_prompt_2, "negative_prompt_2", device, None, states.shape[1], lora_scale
            )
            pooled_negative = own if pooled_negative is None else pooled_negative
        for name, one, other in (
            ("prompt_embeds", negative, states),
            ("pooled_prompt_embeds", pooled_negative, pooled),
        ):
            if guided and one.shape != other.shape:
                raise ValueError(f"negative_{name} has shape {tuple(one.shape)}, {name} {tuple(other.shape)}")

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.to(device, self.unet.dtype).repeat_interleave(num_images_per_prompt, dim=0)

        negatives = (repeat(negative), repeat(pooled_negative)) if guided else (None, None)
        return repeat(states), negatives[0], repeat(pooled), negatives[1]

    def _encode(
        self,
        texts: list[str],
        texts_2: str | list[str] | None,
        name_2: str,
        device: torch.device,
        clip_skip: int | None,
        length: int | None,
        lora_scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Both encoders' states beside one another, (texts, L, n), and the pooled one, (texts, m)."""
        encoders = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        encoders = [pair for pair in encoders if None not in pair]
        if self.text_encoder_2 is None or not encoders:
            raise ValueError("text_encoder_2 is None: give prompt_embeds and pooled_prompt_embeds, and their negatives")
        texts_2 = as_texts(name_2, texts_2 or texts)
        texts_2 = texts_2 * len(texts) if len(texts_2) == 1 else texts_2
        if len(texts_2) != len(texts):
            raise ValueError(f"{name_2} has {len(texts_2)} texts for {len(texts)}")
        parts = []
        # With one encoder (the refiner) that one reads the first texts
        for (tokenizer, encoder), own in zip(encoders, (texts, texts_2), strict=False):
            skip = check_clip_skip(clip_skip, encoder, most=encoder.config.num_hidden_layers - 1) or 0
            with lora.scaled(lora_scale):
                out = encoder(token_ids(tokenizer, own, length).to(device_of(encoder)), output_hidden_states=True)
            parts.append(out.hidden_states[-(skip + 2)].to(device))  # before the last norm: XL was trained so
        return torch.cat(parts, dim=-1), out.text_embeds

    def text_tensors(self, texts: tuple, states: tuple, num_images_per_prompt: int) -> tuple[Tensors, int]:
        """What the loop's `tensors` hold of a prompt, and the number of pictures B. `texts`, `states`: the prompts and
        the embeds that `encode_prompt` takes, four each."""
        (prompt, prompt_2, *negatives), guided = texts, self.do_classifier_free_guidance
        arguments = (prompt, prompt_2, None, num_images_per_prompt, guided, *negatives, *states)
        states, negative, pooled, pooled_negative = self.encode_prompt(*arguments, clip_skip=self.clip_skip)
        if guided:  # (2B, L, n) and (2B, m)
            joined = {"prompt_embeds": [negative, states], "add_text_embeds": [pooled_negative, pooled]}
            tensors = {name: torch.cat(parts) for name, parts in joined.items()}
        else:
            tensors = {"prompt_embeds": states, "add_text_embeds": pooled}
        return tensors | self.scale_tensors(len(states)), len(states)

    def told(self, tensors: Tensors, x: Tensor, t: Tensor) -> dict[str, Any]:
        return read_text_and_sizes(tensors, x, t)

    def time_ids(self, B: int, numbers: tuple[float, ...], negative: tuple[float, ...]) -> Tensor:
        """The micro-conditioning (SDXL, 2.2): (B, 6) or (B, 5); with guidance first the negatives', (2B, ...)."""
        c = self.unet.config
        width = c.projection_class_embeddings_input_dim // c.addition_time_embed_dim
        pooled = c.projection_class_embeddings_input_dim - len(numbers) * c.addition_time_embed_dim
        projected = pooled if self.text_encoder_2 is None else self.text_encoder_2.config.projection_dim
        if projected != pooled:
            raise ValueError(
                f"the unet takes {c.projection_class_embeddings_input_dim} numbers of micro-conditioning and text, but"
                f" requires_aesthetics_score={self.requires_aesthetics_score} makes"
                f" {len(numbers) * c.addition_time_embed_dim + projected} of them (at most {width} numbers fit)"
            )
        rows = [negative, numbers] if self.do_classifier_free_guidance else [numbers]
        ids = torch.tensor(rows, dtype=self.unet.dtype, device=self._execution_device)
        return ids.repeat_interleave(B, dim=0)

    def finish(self, latents: Tensor, output_type: str, return_dict: bool) -> StableDiffusionXLPipelineOutput | tuple:
        """Latents -> what the call returns."""
        images = latents
        if output_type != "latent":
            pictures = decode_latents(self.vae, latents, self._execution_device, self.latents_as)
            marked = self.add_watermarker
            if marked or (marked is None and importlib.util.find_spec("imwatermark") is not None):
                pictures = watermarked(pictures)
            images = to_output(pictures, output_type)
        result = StableDiffusionXLPipelineOutput(images)
        return result if return_dict else tuple(result)


def read_text_and_sizes(tensors: Tensors, x: Tensor, t: Tensor) -> dict[str, Any]:
    """What XL's UNet is told."""
    added = {"text_embeds": tensors["add_text_embeds"], "time_ids": tensors["add_time_ids"]}
    return read_text(tensors, x, t) | {"added_cond_kwargs": added}


def as_pair(name: str, value: Any, default: tuple[int, int]) -> tuple[int, int]:
    """A size or a place: two numbers."""
    if value is None:
        return default
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be a pair of numbers, the height or top first")
    return tuple(value)


def watermarked(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] with an invisible mark, if they are 256 pixels wide or more: smaller ones can't hold it.

    The package invisible-watermark marks them (its method dwtDct), in bytes, blue first.
    """
    if pictures.shape[-1] < 256:
        return pictures
    from imwatermark import WatermarkEncoder

    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in f"{WATERMARK:b}"])
    arrays = (255 * (pictures / 2 + 0.5)).cpu().permute(0, 2, 3, 1).float().numpy()[..., ::-1]
    marked = np.stack([encoder.encode(array, "dwtDct")[..., ::-1] for array in arrays])
    return (2 * (torch.from_numpy(marked).permute(0, 3, 1, 2) / 255 - 0.5)).clamp(-1, 1).to(pictures)


def _check_pairs(name: str, text: Any, text_2: Any, states: Any, pooled: Any, needed: bool = False) -> None:
    """Either texts or states; and with states the pooled one too."""
    own = "pooled_prompt_embeds" if needed else "negative_pooled_prompt_embeds"
    given = {f"{name}_embeds": (states, 3), own: (pooled, 2)}
    for key, (value, dims) in given.items():
        if value is not None:
            check_tensors(**{key: value})
            if value.ndim != dims:
                raise ValueError(f"{key} has shape {tuple(value.shape)}; it must have {dims} dimensions")
    if states is None and needed and text is None:
        raise ValueError(f"give either {name} or {name}_embeds")
    if states is not None and (text is not None or text_2 is not None):
        raise ValueError(f"give either {name} or {name}_embeds, and not both")
    if states is not None and pooled is None:
        raise ValueError(f"{name}_embeds was given without {own}: XL's UNet reads both")
