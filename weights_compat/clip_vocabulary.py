"""The vocabulary of every CLIP tokenizer on the Hub, rebuilt from its merges (`manifests/clip-merges.txt`).

The merges are OpenAI's, MIT license: https://github.com/openai/CLIP (bpe_simple_vocab_16e6.txt.gz).
"""

import json
from pathlib import Path

MERGES = Path(__file__).parent / "manifests" / "clip-merges.txt"


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 49,408 tokens with their ids, and the 48,894 merges.

    In the order of their ids: a symbol for each of the 256 bytes (GPT-2's: Latin-1's visible characters stand for
    themselves, the other 68 bytes are the characters from 256 on), the same at the end of a word, each merge joined,
    and the start and the end of text.
    """
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]  # the first one is a comment
    merges = [tuple(line.split(" ")) for line in lines]
    symbols = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_clip_tokenizer(folder: str | Path, pad_token: str = "<|endoftext|>") -> None:
    """Writes the folder of SD 1.5's tokenizer, or with `pad_token="!"` that of XL's second one, as the Hub has them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, _ = clip_vocabulary()
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    texts = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {key: {"content": text, **flags} for key, text in texts.items()}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        "pad_token": pad_token,
        **{key: {"__type": "AddedToken", **token} for key, token in special.items()},
    }
    for name, values in {
        "vocab.json": vocab,
        "special_tokens_map.json": {**special, "pad_token": pad_token},
        "tokenizer_config.json": config,
    }.items():
        (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_bytes(MERGES.read_bytes())
