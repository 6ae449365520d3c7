"""BertTokenizer: WordPiece (BERT, arXiv 1810.04805, section 3), for the first text-to-image latent diffusion.

The `tokenizers` library does the work; this file reads and writes the Hub's folders.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from ..loading.component import Component
from ..loading.config import Config, LoadError, check_readable, read_json
from ..loading.weights import Files
from .tokenizer import NO_LIMIT, BatchEncoding

SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True, eq=False)
class BertTokenizerConfig(Config):
    """`tokenizer_config.json`. A token is its text, or a mapping with `content`."""

    pad_token: str | dict = "[PAD]"
    unk_token: str | dict = "[UNK]"
    cls_token: str | dict = "[CLS]"
    sep_token: str | dict = "[SEP]"
    mask_token: str | dict = "[MASK]"
    do_lower_case: bool = True
    strip_accents: bool | None = None  # None: where it lowercases
    tokenize_chinese_chars: bool = True
    model_max_length: int = NO_LIMIT
    tokenizer_class: Literal["BertTokenizer", "BertTokenizerFast"] = "BertTokenizer"

    inert: ClassVar[dict] = {
        **dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file"), "where the files once were"),
        **dict.fromkeys(("backend", "is_local", "local_files_only", "processor_class"), "how transformers loaded them"),
        "use_fast": "there is one tokenizer here",
        "trust_remote_code": "no code of a folder is run",
        "clean_up_tokenization_spaces": "for decoding",
        "do_basic_tokenize": "words are cut first, always",
        "never_split": "read by transformers' slow tokenizer alone",
        "added_tokens_decoder": "the special tokens again",
    }

    def __post_init__(self):
        super().__post_init__()
        for key in SPECIAL:
            value = self[key]
            text = value.get("content") if isinstance(value, dict) else value
            self.require(isinstance(text, str), key, "be a text, or a mapping with one as content")
            object.__setattr__(self, key, text)


class BertTokenizer(Component):
    """`vocab` maps tokens to ids; pieces that go on within a word begin with ##.

    Raises ConfigError for a key, ValueError for a vocabulary without the special tokens.
    """

    library, aliases = "transformers", ("BertTokenizerFast",)
    files = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

    def __init__(self, vocab: Mapping[str, int], **config):
        c = self.config = BertTokenizerConfig.read(config)
        for key in SPECIAL:
            if c[key] not in vocab:
                raise ValueError(f"vocab has no {c[key]!r}, the {key}")
        lower, chinese = c.do_lower_case, c.tokenize_chinese_chars
        self._backend = Tokenizer(WordPiece(dict(vocab), unk_token=c.unk_token, max_input_chars_per_word=100))
        self._backend.normalizer = normalizers.BertNormalizer(True, chinese, c.strip_accents, lower)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ends = [(token, vocab[token]) for token in (c.sep_token, c.cls_token)]
        self._backend.post_processor = processors.BertProcessing(*ends)
        self._backend.add_special_tokens([c[key] for key in SPECIAL])
        self.pad_token_id, self.model_max_length = vocab[c.pad_token], c.model_max_length

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask`, lists for each text or, with `return_tensors="pt"`, int64 (B, L).

        `padding="max_length"` pads to `max_length` (else `model_max_length`), True to the longest text; `truncation`
        cuts to it, and keeps the end.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(item, str) for item in texts):
            raise TypeError(f"text={text!r} is not supported; supported: a string, a list of strings")
        length = self.model_max_length if max_length is None else max_length
        if (truncation or padding == "max_length") and not 2 <= length < NO_LIMIT:
            raise ValueError(f"max_length={max_length!r} is needed, 2 or more: this tokenizer has no model_max_length")
        rows = [self._backend.encode(item).ids for item in texts]
        if truncation:
            rows = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in rows]
        longest = length if padding == "max_length" else max(map(len, rows)) if padding else 0
        pads = [max(0, longest - len(ids)) for ids in rows]
        encoding = {
            "input_ids": [ids + [self.pad_token_id] * pad for ids, pad in zip(rows, pads, strict=True)],
            "attention_mask": [[1] * len(ids) + [0] * pad for ids, pad in zip(rows, pads, strict=True)],
        }
        if return_tensors == "pt":
            if len(set(map(len, encoding["input_ids"]))) > 1:
                raise ValueError("texts of different lengths make no tensor: set padding, and truncation too")
            return BatchEncoding({key: torch.tensor(lists, dtype=torch.int64) for key, lists in encoding.items()})
        return BatchEncoding(encoding if texts is text else {key: lists[0] for key, lists in encoding.items()})

    @classmethod
    def read_from(cls, folder: Path, files: Files | None = None) -> Self:
        """Reads vocab.txt, or tokenizer.json where transformers 5 has written it. Raises LoadError and ConfigError."""
        file = folder / "tokenizer.json"
        try:
            if os.path.lexists(file):  # the reference prefers it too
                vocab = {token: int(index) for token, index in read_json(file)["model"]["vocab"].items()}
            else:
                check_readable(file := folder / "vocab.txt")
                tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
                vocab = {token: index for index, token in enumerate(tokens)}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(f"{file} is not that of a WordPiece tokenizer: {error!r}") from None
        values = read_json(folder / "tokenizer_config.json")
        try:
            return cls(vocab, **values)
        except ValueError as error:
            raise LoadError(f"{file}: {error}") from None

    def write_to(self, folder: Path, files: Files | None = None) -> None:
        """Writes the files of transformers 4 and of 5."""
        self._backend.model.save(str(folder))  # vocab.txt
        self._backend.save(str(folder / "tokenizer.json"))
        text = json.dumps(dict(self.config), indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
