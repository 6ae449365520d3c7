"""Textual inversion (An image is worth one word, arXiv 2208.01618): new words for a text encoder, a vector or several
for each, that somebody has trained on pictures. The tokenizer gives them ids, the text encoder's table their rows."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checks import as_names
from ..loading.config import LoadError
from ..loading.tensors import read_pickle, read_tensors
from ..models import CLIPTextModel, CLIPTokenizer
from .adapters import file_or_given
from .prompt import all_vectors, as_texts, with_all_vectors

USUAL = ("learned_embeds.safetensors", "learned_embeds.bin")
MAX_VECTORS = 1024  # of a token; no prompt holds more. A pickle may claim any number, and hold one
Source = str | os.PathLike | Tensor | Mapping[str, Any]
Pair = tuple[CLIPTokenizer, CLIPTextModel]


class TextualInversion:
    """For the pipelines of Stable Diffusion."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source | list[Source],
        token: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: CLIPTextModel | None = None,
        **keywords: Any,
    ) -> None:
        """Adds tokens, called as the file says or `token`, to the first text encoder unless another one is given; to
        both where a file has clip_l and clip_g. In a prompt a token of n vectors takes n places.

        A file (diffusers' learned_embeds, A1111's .pt, XL's), a folder or Hub repository (`weight_name`), or what is in
        one; a tensor (n, width), or with n tokens a vector of it for each; or a list of these. Raises LoadError for a
        file, ValueError for an argument; the pipeline is then as it was.
        """
        sources, paths = pretrained_model_name_or_path, {"token": keywords.pop("hf_token", None)} | keywords
        sources = sources if isinstance(sources, list) else [sources]
        if len(sources) == 1 and isinstance(sources[0], Tensor) and isinstance(token, list) and len(token) > 1:
            sources = list(sources[0])
        tokens = token if isinstance(token, list) else [token] * len(sources)
        if len(tokens) != len(sources):
            raise ValueError(f"token has {len(tokens)} for {len(sources)} embeddings: give one for each")
        new: dict[Pair, dict[str, Tensor]] = {}  # the vectors of each text encoder's new tokens
        for source, name in zip(sources, tokens, strict=True):
            found = file_or_given(type(self).__name__, source, USUAL, paths, Tensor | Mapping)
            where = "the given embedding"
            if found is not source:
                where, safe = found, found.suffix == ".safetensors"
                found = dict(read_tensors(found)) if safe else read_pickle(found)
            for end, word, vectors in _found(found, name, where):
                pair = self._pairs(tokenizer, text_encoder)[end]
                if None in pair:
                    raise ValueError(f"{where}: is for a tokenizer{end} and text_encoder{end}, which aren't there")
                words = [word, *(f"{word}_{i}" for i in range(1, _count(vectors, pair[1], where)))]
                there = [*pair[0].added_tokens_encoder, *new.setdefault(pair, {})]
                vocab, there = pair[0].get_vocab(), {one.lower() for one in there}  # as prompts are read
                if taken := [one for one in (*words, f"{word}_1") if one in vocab or one.lower() in there]:
                    raise ValueError(f"token={taken[0]!r} is in the tokenizer already: unload it, or take another")
                if len(words) > 1 and word != word.lower():  # see `with_all_vectors`
                    warnings.warn(f"token={word!r} gives its first vector alone, {word.lower()!r} all", stacklevel=2)
                new[pair] |= zip(words, vectors.reshape(len(words), -1), strict=True)
        for (words, encoder), rows in new.items():
            table = encoder.resize_token_embeddings(len(words) + len(rows)).weight.data
            words.add_tokens(list(rows))
            for word, row in rows.items():
                table[words.convert_tokens_to_ids(word)] = row.to(table)

    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: CLIPTextModel | None = None,
    ) -> None:
        """Removes tokens with all their vectors (None: all that were added) from the text encoders that have them.
        Raises ValueError for one that none has."""
        wanted = None if tokens is None else as_names(tokens, "tokens")
        found: dict[Pair, list[str]] = {}
        for words, encoder in self._pairs(tokenizer, text_encoder).values():
            added = {} if None in (words, encoder) else words.added_tokens_decoder
            added = [str(token) for i, token in added.items() if not token.special and i >= words.vocab_size]
            mine = added if wanted is None else [one for word in wanted for one in all_vectors(word, added)]
            found |= {(words, encoder): mine} if mine else {}
        there = {one for mine in found.values() for one in mine}
        if missing := [one for one in wanted or () if one not in there]:
            raise ValueError(f"tokens has {', '.join(missing)}, which no tokenizer was given")
        for (words, encoder), mine in found.items():
            removed, rows = words.remove_tokens(mine), encoder.get_input_embeddings().weight.data
            encoder.set_token_rows(rows[[i for i in range(len(rows)) if i not in removed]])

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: CLIPTokenizer) -> str | list[str]:
        """The prompt with a token for each vector. Calls do it themselves."""
        convert = [with_all_vectors(text, tokenizer) for text in as_texts("prompt", prompt)]
        return convert[0] if isinstance(prompt, str) else convert

    def _pairs(self, tokenizer: CLIPTokenizer | None, text_encoder: CLIPTextModel | None) -> dict[str, Pair]:
        """The tokenizers and text encoders, by what their names end with; or the given ones alone."""
        find = self.components.get
        own = {end: (find(f"tokenizer{end}"), find(f"text_encoder{end}")) for end in ("", "_2")}
        given = {"": (tokenizer or own[""][0], text_encoder or own[""][1]), "_2": (None, None)}
        return own if tokenizer is text_encoder is None else given


def _found(source: Any, token: str | None, where: Any) -> list[tuple[str, str, Any]]:
    """For which text encoder ("" or "_2") an embedding is, its token, and its vectors."""
    parts, name = {"": source}, None
    if isinstance(source, Mapping):
        if "string_to_param" in source and isinstance(source["string_to_param"], Mapping):  # A1111's
            parts, name = {"": source["string_to_param"].get("*")}, source.get("name")
        elif source and source.keys() <= {"clip_l", "clip_g"}:  # XL's
            parts = {{"clip_l": "", "clip_g": "_2"}[key]: value for key, value in source.items()}
        elif len(source) == 1:  # diffusers'
            ((key, vectors),) = source.items()
            parts, name = {"": vectors}, key
    for vectors in parts.values():
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            must = "one token's vectors, or string_to_param, or clip_l and clip_g"
            raise LoadError(f"{where}: is no embedding: it must hold {must}")
    name = name if token is None else token
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: its token is called {name!r}, which no prompt can hold: give token a name")
    return [(end, name, vectors) for end, vectors in parts.items()]


def _count(vectors: Tensor, encoder: CLIPTextModel, where: Any) -> int:
    width = encoder.get_input_embeddings().embedding_dim
    count = len(vectors) if vectors.ndim == 2 else 1
    if vectors.shape not in ((width,), (count, width)) or not 0 < count <= MAX_VECTORS:
        takes = f"takes up to {MAX_VECTORS} vectors of {width} numbers"
        raise LoadError(f"{where}: holds a tensor of {tuple(vectors.shape)}; the text encoder {takes}")
    return count
