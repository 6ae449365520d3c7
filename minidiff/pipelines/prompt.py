"""Texts -> states: what the network reads of a prompt, and of what a picture should not show."""

import itertools
import warnings
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import as_integer, check_tensors
from ..models import CLIPTextModel, CLIPTokenizer
from ..models.unet import timestep_embedding
from .memory import device_of


def as_texts(name: str, value: str | list[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, not {value!r}")
    return list(texts)


def check_clip_skip(clip_skip: Any, text_encoder: CLIPTextModel, most: int | None = None) -> int | None:
    if clip_skip is None:
        return None
    layers = text_encoder.config.num_hidden_layers if most is None else most
    if not 0 <= as_integer(clip_skip, "clip_skip") <= layers:
        raise ValueError(f"clip_skip={clip_skip!r} must be an integer from 0 to {layers}")
    return int(clip_skip)


def encode_texts(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    texts: list[str],
    device: torch.device,
    clip_skip: int | None = None,
    length: int | None = None,
) -> Tensor:
    """(texts, L, hidden_size); texts are cut or padded to `length` tokens, by default the tokenizer's."""
    ids = token_ids(tokenizer, texts, length).to(device_of(text_encoder))
    if clip_skip is None:
        return text_encoder(ids).last_hidden_state.to(device)
    # The last norm is applied to whichever layer's states are taken: the UNet was trained on normed states
    states = text_encoder(ids, output_hidden_states=True).hidden_states
    return text_encoder.final_layer_norm(states[-(clip_skip + 1)]).to(device)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str], length: int | None = None) -> Tensor:
    """(texts, L): texts are cut, which is warned of, or padded to `length` tokens, by default the tokenizer's."""
    length, texts = length or tokenizer.model_max_length, [with_all_vectors(text, tokenizer) for text in texts]
    for row in tokenizer(texts).input_ids:
        if len(row) > length:
            lost = tokenizer.decode(row[length - 1 : -1])
            warnings.warn(f"prompt is longer than {length} tokens; left out: {lost!r}", stacklevel=5)
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def with_all_vectors(text: str, tokenizer: CLIPTokenizer) -> str:
    """A token of several vectors is a token for each: <cat> reads <cat> <cat>_1 <cat>_2. In the reference, and so here,
    that holds for names without capitals: `tokenize` gives a token as it is searched for, which is in lower case."""
    known = tokenizer.added_tokens_encoder
    for token in dict.fromkeys(tokenizer.tokenize(text)):
        if token in known:
            text = text.replace(token, " ".join(all_vectors(token, known)))
    return text


def all_vectors(token: str, known: Collection[str]) -> list[str]:
    """Of the tokens that are `known`, those of all its vectors."""
    names = itertools.chain([token], (f"{token}_{i}" for i in itertools.count(1)))
    return list(itertools.takewhile(known.__contains__, names))


def encode_prompt(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    device: torch.device,
    dtype: torch.dtype,
    prompt: str | list[str] | None,
    num_images_per_prompt: int,
    guided: bool,
    negative_prompt: str | list[str] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """States for the prompts and, where `guided`, for their negatives: (prompts * images, L, hidden_size), else None.

    `clip_skip` leaves out layers for the prompts alone, as in the reference: the negatives are taken whole.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, and not both")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, and not both")
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    check_tensors(**{name: value for name, value in given.items() if value is not None})
    for name, value in given.items():
        if value is not None and value.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have (prompts, length, hidden_size)")
    clip_skip = check_clip_skip(clip_skip, text_encoder)
    if clip_skip is not None and prompt is None:
        warnings.warn("clip_skip has no effect beside prompt_embeds, which are taken as they are", stacklevel=3)
    if not guided and (negative_prompt or negative_prompt_embeds is not None):
        warnings.warn("the negative prompt has no effect: guidance_scale is 1 or less", stacklevel=3)

    if prompt_embeds is None:
        texts = as_texts("prompt", prompt)
        prompt_embeds = encode_texts(tokenizer, text_encoder, texts, device, clip_skip)
    negatives = as_texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    negatives = negatives * len(prompt_embeds) if len(negatives) == 1 else negatives
    if len(negatives) != len(prompt_embeds):
        raise ValueError(f"negative_prompt has {len(negatives)} texts for {len(prompt_embeds)} prompts")
    if guided and negative_prompt_embeds is None:
        length, most = prompt_embeds.shape[1], text_encoder.config.max_position_embeddings
        if length > most:
            raise ValueError(
                f"prompt_embeds has {length} tokens, and the text encoder reads {most}: give negative_prompt_embeds"
                " of the same length (those of several pieces, joined), or guidance_scale=1"
            )
        negative_prompt_embeds = encode_texts(tokenizer, text_encoder, negatives, device, length=length)
    if guided and negative_prompt_embeds.shape != prompt_embeds.shape:
        raise ValueError(
            f"negative_prompt_embeds has shape {tuple(negative_prompt_embeds.shape)},"
            f" prompt_embeds {tuple(prompt_embeds.shape)}: they must agree"
        )

    def repeat(states: Tensor) -> Tensor:
        return states.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)

    return repeat(prompt_embeds), repeat(negative_prompt_embeds) if guided else None


def read_text(tensors: dict[str, Tensor], x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """What the UNet is told where it is told of the prompt alone; a distilled one is told the guidance scale too."""
    scale = {"timestep_cond": tensors["w_embedding"]} if "w_embedding" in tensors else {}
    return {"encoder_hidden_states": tensors["prompt_embeds"], **scale}


def guidance_waves(guidance_scale: float, dim: int) -> Tensor:
    """(1, dim), float32: the guidance that a distilled UNet was taught to draw with, in one pass (Latent consistency
    models, arXiv 2310.04378, section 4.1). They are waves of 1000 w, as of a timestep; w is the scale less 1."""
    waves = timestep_embedding(torch.tensor([guidance_scale - 1]) * 1000, dim, False, 1)
    return F.pad(waves, (0, dim % 2))
