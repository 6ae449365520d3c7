"""CLIP's tokenizer: text in, token ids out.

Text is composed (NFC), its white space collapsed, lowercased and cut into words; each word's UTF-8 bytes become symbols
(GPT-2's byte-level alphabet), the last one marked with `</w>`, and learned merges join neighbours until none applies
(byte-pair encoding: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). Every text gets a start and an end token.
The `tokenizers` library does that work; this file reads and writes the Hub's folders, cuts and pads.
"""

import json
import operator
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..loading.component import Component
from ..loading.config import Config, ConfigError, LoadError, check_readable, read_json
from ..loading.weights import Files

# A word: a special token, the end of a contraction, letters, ONE digit, or a run of other signs.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a `model_max_length`


@dataclass(frozen=True, eq=False)
class TokenizerConfig(Config):
    """`tokenizer_config.json`. A token is its text, or a mapping with `content` and the flags of an `AddedToken`.

    `added_tokens_decoder` maps ids to the tokens that a text is searched for before it is cut into words.
    """

    bos_token: str | dict | AddedToken = "<|startoftext|>"
    eos_token: str | dict | AddedToken = "<|endoftext|>"
    unk_token: str | dict | AddedToken = "<|endoftext|>"
    pad_token: str | dict | AddedToken = "<|endoftext|>"
    additional_special_tokens: tuple[str, ...] = ()  # transformers 4
    extra_special_tokens: tuple[str, ...] | dict = ()  # transformers 5; the last ones of 4 write {}
    added_tokens_decoder: dict = field(default_factory=dict)
    model_max_length: int = NO_LIMIT
    padding_side: Literal["right"] = "right"
    truncation_side: Literal["right"] = "right"
    split_special_tokens: Literal[False] = False
    tokenizer_class: Literal["CLIPTokenizer", "CLIPTokenizerFast"] = "CLIPTokenizer"

    inert: ClassVar[dict] = {
        "add_prefix_space": "GPT-2's: a word of CLIP's is the same with and without a space before it",
        "do_lower_case": "CLIP's text is lowercased whatever it says",
        "errors": "bytes that are not UTF-8 always decode to the replacement character",
        "clean_up_tokenization_spaces": "meant for WordPiece; transformers 5 ignores it for byte pairs",
        **dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file"), "where the files once were"),
        **dict.fromkeys(("backend", "is_local", "local_files_only", "processor_class"), "how transformers loaded them"),
        **dict.fromkeys(("use_fast", "trust_remote_code"), "how transformers was asked to load them"),
        **dict.fromkeys(("max_length", "stride", "truncation_strategy"), "arguments of a call before the save"),
        **dict.fromkeys(("pad_to_multiple_of", "pad_token_type_id"), "arguments of a call before the save"),
    }

    def __post_init__(self):
        super().__post_init__()
        extra, added = self.extra_special_tokens, self.added_tokens_decoder
        self.require(isinstance(extra, tuple) or not extra, "extra_special_tokens", "be a list of tokens")
        self.require(all(str(index).isdecimal() for index in added), "added_tokens_decoder", "map ids to tokens")
        tokens = {int(index): _token(f"added_tokens_decoder[{index}]", token) for index, token in added.items()}
        object.__setattr__(self, "added_tokens_decoder", dict(sorted(tokens.items())))
        for key in SPECIAL:
            object.__setattr__(self, key, _token(key, self[key]))


def _token(key: str, value: str | dict | AddedToken) -> str | AddedToken:
    if not isinstance(value, dict):
        return value
    flags = {name: flag for name, flag in value.items() if name not in ("__type", "id", "content")}
    if not isinstance(value.get("content"), str) or not all(type(flag) is bool for flag in flags.values()):
        raise ConfigError(f"{key}={value!r} is not a token: it needs a text as content, and true or false for the rest")
    if unknown := sorted(flags.keys() - {"lstrip", "rstrip", "normalized", "single_word", "special"}):
        raise ConfigError(f"{key}={value!r} is not a token: unknown key {unknown[0]}")
    return AddedToken(value["content"], **flags)


def _special_tokens(config: TokenizerConfig) -> list[AddedToken]:
    """The tokens to search a text for. Of those with one text the last one's flags hold, as in the reference.

    In SD 1.5's folder that is the bare string of `pad_token`, which is searched for before lowercasing: <|ENDOFTEXT|>
    is text there, and a token in XL's second tokenizer, whose `pad_token` is "!".
    """
    tokens = list(config.added_tokens_decoder.values())
    known = {str(token) for token in tokens}
    named = [config[key] for key in SPECIAL]
    for token in (*named, *config.additional_special_tokens, *config.extra_special_tokens):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in tokens:
        token.special = token.special or str(token) in map(str, named)
    return tokens


class BatchEncoding(dict):
    """What a tokenizer's call returns: a mapping whose keys read as attributes too (`encoding.input_ids`)."""

    def __getattr__(self, key: str) -> Any:
        if key in self:
            return self[key]
        raise AttributeError(f"the encoding has no {key!r}; it has {', '.join(self)}")


class CLIPTokenizer(Component):
    """Byte-pair tokenizer of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4).

    `vocab` maps tokens to ids, `merges` are the pairs to join, the first ones first; `config` are the keys of a
    TokenizerConfig. Raises ConfigError for a key, ValueError for a vocabulary that merges or tokens don't fit.
    """

    library, aliases = "transformers", ("CLIPTokenizerFast",)
    files = (
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
        *("special_tokens_map.json", "added_tokens.json"),
    )

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **config):
        config = TokenizerConfig.read(config)
        named = {key: str(config[key]) for key in SPECIAL}
        added = config.added_tokens_decoder
        seen: dict[int, str] = {}
        for token, index in vocab.items():
            if type(index) is not int or not 0 <= index < 2**32:
                raise ValueError(f"vocab maps {token!r} to {index!r}: ids are whole numbers from 0")
            if seen.setdefault(index, token) != token:
                raise ValueError(f"vocab maps both {seen[index]!r} and {token!r} to {index}: ids must be different")
        for key, text in named.items():
            if text not in vocab and text not in map(str, added.values()):
                raise ValueError(f"vocab has no {text!r}, the {key}")
        try:
            model = BPE(dict(vocab), list(merges), unk_token=named["unk_token"], end_of_word_suffix=END_OF_WORD)
        except Exception as error:  # the library has no narrower class
            raise ValueError(f"vocab and merges do not fit together: {error}") from None
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
        self._backend = Tokenizer(model)
        self._backend.normalizer = normalizers.Sequence(steps)
        self._backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        self._backend.decoder = decoders.ByteLevel()
        self._backend.add_tokens(_special_tokens(config))
        for index, token in added.items():
            if (place := self._backend.token_to_id(str(token))) != index:
                raise ValueError(f"vocab leaves the id {place} to the added token {str(token)!r}, whose id is {index}")

        self.bos_token, self.eos_token, self.unk_token, self.pad_token = named.values()
        ids = map(self._backend.token_to_id, named.values())
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = ids
        start, end = (self.bos_token, self.bos_token_id), (self.eos_token, self.eos_token_id)
        self._backend.post_processor = processors.RobertaProcessing(end, start, False, False)
        self.model_max_length = config.model_max_length

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Token ids (`input_ids`), and 1 where they are text, 0 where padding (`attention_mask`).

        Lists, one a text, or one list alone for a string; with `return_tensors="pt"` int64 tensors (B, L), where a
        string makes B = 1. `padding`: True or "longest" to the longest text, "max_length" to `max_length`, which is
        `model_max_length` unless given. `truncation` cuts to `max_length` and keeps the end token; like the reference,
        a `max_length` without `padding` turns it on.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(item, str) for item in texts):
            raise TypeError(f"text={text!r} is not supported; supported: a string, a list of strings")
        if not texts:
            raise ValueError("text is an empty list; it needs at least one string")
        for name, value, supported in (
            ("padding", padding, (False, True, "longest", "max_length")),
            ("truncation", truncation, (None, False, True)),
            ("return_tensors", return_tensors, (None, "pt")),
        ):
            if value not in supported:
                raise ValueError(f"{name}={value!r} is not supported; supported: {', '.join(map(repr, supported))}")
        if truncation is None:
            truncation = max_length is not None and padding is False
        if max_length is None and (truncation or padding == "max_length"):
            max_length = self.model_max_length
            if max_length >= NO_LIMIT:
                raise ValueError("max_length is needed: this tokenizer has no model_max_length")
        end = int(add_special_tokens)
        if max_length is not None and (type(max_length) is not int or max_length < 1 + end):
            raise ValueError(f"max_length={max_length!r} is not supported: it must be an integer from {1 + end}")
        for item in texts:
            item.encode()  # half a surrogate pair: Python's error says so, the library's doesn't

        rows = [self._backend.encode(item, add_special_tokens=add_special_tokens).ids for item in texts]
        if truncation:
            rows = [ids if len(ids) <= max_length else ids[: max_length - end] + ids[len(ids) - end :] for ids in rows]
        length = 0 if padding is False else max_length if padding == "max_length" else max(map(len, rows))
        pads = [max(0, length - len(ids)) for ids in rows]
        encoding = {"input_ids": [ids + [self.pad_token_id] * pad for ids, pad in zip(rows, pads, strict=True)]}
        if return_attention_mask:
            encoding["attention_mask"] = [[1] * len(ids) + [0] * pad for ids, pad in zip(rows, pads, strict=True)]
        if return_tensors == "pt":
            if len(set(map(len, encoding["input_ids"]))) > 1:
                raise ValueError("texts of different lengths make no tensor: set padding, and truncation too")
            return BatchEncoding({key: torch.tensor(lists, dtype=torch.int64) for key, lists in encoding.items()})
        return BatchEncoding(encoding if texts is text else {key: lists[0] for key, lists in encoding.items()})

    def tokenize(self, text: str) -> list[str]:
        """The tokens of `text` as the vocabulary writes them, without start and end."""
        return self._backend.encode(text, add_special_tokens=False).tokens

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """The text of an id or of a list or tensor (L,) of ids; a list of texts for a list of lists or a tensor (B, L).

        Ids that don't exist are left out.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, list | tuple) and ids and isinstance(ids[0], list | tuple):
            return [self.decode(row, skip_special_tokens) for row in ids]
        ids = [operator.index(index) for index in (ids if isinstance(ids, list | tuple) else [ids])]
        if min(ids, default=0) < 0:
            raise ValueError(f"token_ids={ids!r} is not supported: ids are 0 or more")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens).replace(END_OF_WORD, " ").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode`, whose result is a list always."""
        texts = self.decode(sequences, skip_special_tokens)
        return [texts] if isinstance(texts, str) else texts

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The ids of tokens; `unk_token`'s for a token that doesn't exist."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._backend.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The tokens of ids; None for an id that doesn't exist."""
        if not isinstance(ids, int):
            return [self.convert_ids_to_tokens(int(index)) for index in ids]
        return self._backend.id_to_token(ids)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without those added after training."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that a text is searched for before it is cut into words, by their ids."""
        return dict(sorted(self._backend.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {str(token): index for index, token in self.added_tokens_decoder.items()}

    def add_tokens(self, new_tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Gives texts ids of their own, after all others, and returns how many had none. `special_tokens` are searched
        for before lowercasing. A text encoder must learn of them: `resize_token_embeddings(len(tokenizer))`."""
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        return self._backend.add_special_tokens(tokens) if special_tokens else self._backend.add_tokens(tokens)

    def remove_tokens(self, tokens: Collection[str]) -> list[int]:
        """Takes back tokens that were added, and returns their ids. Later ids move up: an id is a row."""
        removed = sorted(self.added_tokens_encoder[token] for token in tokens)
        values = json.loads(self._backend.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] not in removed]
        for token in values["added_tokens"]:
            token["id"] -= sum(index < token["id"] for index in removed)
        self._backend = Tokenizer.from_str(json.dumps(values))
        return removed

    @classmethod
    def read_from(cls, folder: Path, files: Files | None = None) -> Self:
        """Reads what transformers 4 writes (vocab.json, merges.txt, special_tokens_map.json, perhaps added_tokens.json)
        or 5 (tokenizer.json), each with tokenizer_config.json.

        Raises LoadError for a file, ConfigError for a key; the message names it.
        """
        file = folder / "tokenizer.json"
        if os.path.lexists(file):  # the reference prefers it too
            vocab, merges, added = _read_tokenizer(file)
        else:
            file = folder / "vocab.json"
            lines = _read_text(folder / "merges.txt").removesuffix("\n").split("\n")
            merges = _pairs(folder / "merges.txt", [line for line in lines if not line.startswith("#version")])
            vocab, added = read_json(file), {}
        config = _read_config(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # else it replaces the other two files
            if os.path.lexists(special_file := folder / "special_tokens_map.json"):
                config |= _read_config(special_file)
            if os.path.lexists(added_file := folder / "added_tokens.json"):
                special = {str(_token(key, config[key])) for key in SPECIAL if key in config}
                added = {**_read_added_tokens(added_file, special), **added}
            config["added_tokens_decoder"] = added
        try:
            return cls(vocab, merges, **config)
        except ValueError as error:
            raise LoadError(f"{file}: {error}") from None

    def write_to(self, folder: Path, files: Files | None = None) -> None:
        """Writes the files of transformers 4 and of 5."""
        self._backend.model.save(str(folder))  # vocab.json, merges.txt
        self._backend.save(str(folder / "tokenizer.json"))
        special = {key: getattr(self, key) for key in SPECIAL}
        added = self._backend.get_added_tokens_decoder()
        config = {
            **special,
            "added_tokens_decoder": {index: added[index].__getstate__() for index in sorted(added)},
            "clean_up_tokenization_spaces": False,  # transformers 4 would
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        for name, values in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_text(file: Path) -> str:
    check_readable(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoadError(f"{file} can't be read: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    values = read_json(file)
    TokenizerConfig.read(values, where=str(file))
    return values


def _read_added_tokens(file: Path, special: set[str]) -> dict[int, dict]:
    values = read_json(file)
    for text, index in values.items():
        if type(index) is not int or index < 0:
            raise LoadError(f"{file} maps {text!r} to {index!r}: ids are whole numbers from 0")
    return {
        index: {"content": text, "special": text in special, "normalized": text not in special}
        for text, index in values.items()
    }


def _read_tokenizer(file: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, dict]]:
    """Vocabulary, merges and added tokens. The rest of the file is the same for all of CLIP's."""
    values = read_json(file)
    try:
        vocab, merges = dict(values["model"]["vocab"]), list(values["model"]["merges"])
        added = {token["id"]: token for token in values["added_tokens"]}
    except (KeyError, TypeError, ValueError) as error:
        must = "model must hold vocab and merges, added_tokens a list of tokens with ids"
        raise LoadError(f"{file} is not that of a byte-pair tokenizer: {must} ({error!r})") from None
    return vocab, _pairs(file, merges), added


def _pairs(file: Path, merges: list[str | list[str]]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LoadError(f"{file}: merge {number + 1} is not two symbols: {merges[number]!r}")
    return [tuple(pair) for pair in pairs]
