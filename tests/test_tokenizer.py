"""CLIPTokenizer against transformers, id for id: on any text, from every layout of folder, with every option."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from minidiff.loading.config import ConfigError, LoadError
from minidiff.models.tokenizer import CLIPTokenizer, TokenizerConfig
from weights_compat.clip_vocabulary import clip_vocabulary, write_clip_tokenizer

CONFIG, MAP, VOCAB, MERGES = "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"
PIECES = [
    *("a", "photo", "of", "Cats", "THE", "don't", "it's", "we'll", "I'VE", "they'Re", "''s", "'", "x's!"),
    *("ﬁ", "ǅ", "İ", "ẞ", "café", "cafe\u0301", "\u0301", "Å", "A\u030a", "ñandú", "Ωmega", "straße"),
    *("日本語", "한국어", "\u1112\u1161\u11ab", "العربية", "ไทย", "\ufffd", "\U0010ffff", "\ufeff"),
    *("😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "\U0001f1e9\U0001f1ea", "\u200b", "\u2028", "\u00a0", "\u3000"),
    *(" ", "  ", "\t", "\n", "\r\n", "\x00", "\x07", "\x1c", "\x85", ".", ",", "</w>", "a</w>"),
    *("1", "42", "2024", "3.14", "\uff11\uff12", "²", "½", "Ⅷ", "٣", "_", "snake_case", "a-b", "..."),
    *("!", "!!", "?!", "#tag", "@", "$5", "<", "|>", "<|endoftext|", "endoftext|>", "[pad]", "[PAD]"),
    *("<|endoftext|>", "<|ENDOFTEXT|>", "<|startoftext|>", "<|StartOfText|>"),
    *("<cat-toy>", "<Cat-Toy>", "<cat-toy>_1", "<SPECIAL>", "<special>"),
]
TEXT = st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
PROMPTS = [
    "",
    " ",
    "a photograph of an astronaut riding a horse",
    "hello!",
    "  Repeated   spaces\n\nand\tlines  ",
    "naïve café, ÅNGSTRÖM 2024 👩‍👩‍👧 日本語!",
    " ".join(f"word{i}," for i in range(1000)),
    "<|endoftext|> inside <|startoftext|> text <|ENDOFTEXT|>",
    "".join(PIECES),
    " ".join(PIECES),
]


def change(folder: Path, name: str, **keys) -> None:
    """Sets keys of a JSON file; a key set to `...` goes away."""
    values = {**json.loads((folder / name).read_text()), **keys} if (folder / name).exists() else keys
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def write_small(folder: Path) -> None:
    """A vocabulary of 120 tokens, without the bytes that its corpus hasn't: those become the unknown token."""
    trained = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(False),
        ]
    )
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=tokens, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(["a red circle on a blue square", "the green photo of two cats, 1 dog!"] * 4, trainer)
    folder.mkdir(parents=True)
    trained.model.save(str(folder))
    config = {"model_max_length": 16, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    names = ("sd15", "xl2", "sd21", "saved by 5", "xl2 saved by 5", "inversion", "inversion of 4.34", "mixed")
    at = {name: root / name for name in names}
    for name in ("sd15", "inversion", "inversion of 4.34", "mixed"):
        write_clip_tokenizer(at[name])
    for name in ("xl2", "sd21"):
        write_clip_tokenizer(at[name], pad_token="!")
    change(at["sd21"], CONFIG, pad_token="<|endoftext|>")  # the two files disagree there

    added = {"<cat-toy>": 49408, "<cat-toy>_1": 49409, "<special>": 49410, "[pad]": 49411}
    change(at["inversion"], "added_tokens.json", **added)
    change(at["inversion"], MAP, additional_special_tokens=["<special>"], pad_token="[pad]")
    flags = {"lstrip": True, "normalized": True, "rstrip": True, "single_word": False, "special": False}
    later = {"49409": {"content": "[pad]", **flags, "normalized": False}, "49408": {"content": "<cat-toy>", **flags}}
    later |= {"49406": {"content": "<|startoftext|>", **flags, "rstrip": False, "special": True}}
    keys = {"pad_token": "[pad]", "extra_special_tokens": {}, "additional_special_tokens": ["<special>"]}
    change(at["inversion of 4.34"], CONFIG, added_tokens_decoder=later, **keys)
    change(at["mixed"], CONFIG, extra_special_tokens=["<special>"])  # three tokens of one text: the third is dropped
    change(at["mixed"], MAP, eos_token="<|endoftext|>")
    for name, source in (("saved by 5", "inversion"), ("xl2 saved by 5", "xl2")):
        transformers.CLIPTokenizer.from_pretrained(at[source]).save_pretrained(at[name])
        assert {file.name for file in at[name].iterdir()} == {"tokenizer.json", CONFIG}
    at["small"] = root / "small"
    write_small(at["small"])
    return at


@pytest.fixture(scope="session")
def pairs(folders) -> dict[str, tuple[CLIPTokenizer, transformers.CLIPTokenizer]]:
    return {
        name: (CLIPTokenizer.read_from(folder), transformers.CLIPTokenizer.from_pretrained(folder))
        for name, folder in folders.items()
    }


def assert_same(ours: CLIPTokenizer, reference: transformers.CLIPTokenizer, text: str) -> None:
    ids = ours(text).input_ids
    assert ids == reference(text).input_ids
    assert ours.tokenize(text) == reference.tokenize(text)
    assert ours.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_any_text_has_the_references_ids(pairs, text):
    for ours, reference in pairs.values():
        assert_same(ours, reference, text)


@pytest.mark.parametrize("text", PROMPTS + PIECES)
def test_known_texts_have_the_references_ids(pairs, text):
    for ours, reference in pairs.values():
        assert_same(ours, reference, text)


def test_ids_of_openai(pairs):
    """From OpenAI's release: tests against the reference alone would follow it into a mistake."""
    sd15, xl2 = pairs["sd15"][0], pairs["xl2"][0]
    assert sd15("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert sd15("hello!").input_ids == [49406, 3306, 256, 49407]
    assert xl2("hello!").input_ids == [49406, 3306, 0, 49407]  # "!" pads there, and is the same token inside a text
    assert sd15("A  PHOTO\nof a Cat").input_ids == sd15("a photo of a cat").input_ids
    assert xl2("hello", padding="max_length").input_ids == [49406, 3306, 49407] + [0] * 74
    assert sd15.decode(sd15("a photo of a cat").input_ids, skip_special_tokens=True) == "a photo of a cat"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49420), max_size=12), skip=st.booleans())
def test_any_ids_decode_as_in_the_reference(pairs, ids, skip):
    for ours, reference in pairs.values():
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("name", ["xl2", "small"])
@pytest.mark.parametrize("padding", [False, True, "longest", "max_length"])
@pytest.mark.parametrize("truncation", [None, False, True])
def test_call_options(pairs, name, padding, truncation):
    ours, reference = pairs[name]
    texts = ["a cat", "", ["a cat"], ["", "a red cat on the blue square!", "two cats"], ("a", "b"), PROMPTS[:6]]
    tensors = 0
    for text, max_length, kind, mask in product(texts, (None, 2, 5, 90), (None, "pt"), (True, False)):
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, "return_tensors": kind}
        options["return_attention_mask"] = mask
        try:
            expected = reference(text, **options)
        except ValueError:
            with pytest.raises(ValueError, match="different lengths make no tensor"):
                ours(text, **options)
            continue
        result = ours(text, **options)
        assert list(result) == list(expected) == ["input_ids", "attention_mask"][: 1 + mask]
        for key, value in expected.items():
            if kind is None:
                assert result[key] == value
            else:
                tensors += 1
                assert result[key].dtype == value.dtype == torch.int64
                assert torch.equal(result[key], value)
                assert getattr(result, key) is result[key]
    assert tensors > 0


def test_truncation_keeps_the_end_token(pairs):
    ids = pairs["sd15"][0](PROMPTS[6], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert ids[0, 0] == 49406 and ids[0, -1] == 49407 and 49407 not in ids[0, :-1]


def test_without_special_tokens(pairs):
    for ours, reference in pairs.values():
        for text, max_length in product(["a cat on a red square", ""], [1, 3, 20]):
            options = {
                "add_special_tokens": False,
                "truncation": True,
                "padding": "max_length",
                "max_length": max_length,
            }
            assert dict(ours(text, **options)) == dict(reference(text, **options))


def test_attributes_and_conversions(pairs):
    tokens = ["a</w>", "cat</w>", "no such token", "<|endoftext|>", "<|ENDOFTEXT|>", "<cat-toy>", "!"]
    for ours, reference in pairs.values():
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            assert getattr(ours, key) == getattr(reference, key)
            assert getattr(ours, f"{key}_id") == getattr(reference, f"{key}_id")
        assert (ours.vocab_size, len(ours)) == (reference.vocab_size, len(reference))
        assert ours.model_max_length == reference.model_max_length
        assert ours.get_vocab() == reference.get_vocab()
        assert ours.convert_tokens_to_ids(tokens) == reference.convert_tokens_to_ids(tokens)
        assert ours.convert_tokens_to_ids("cat</w>") == reference.convert_tokens_to_ids("cat</w>")
        assert ours.convert_ids_to_tokens(50) == reference.convert_ids_to_tokens(50)
        assert ours.convert_ids_to_tokens(torch.tensor([5, 7])) == reference.convert_ids_to_tokens(torch.tensor([5, 7]))


def test_decode_takes_what_the_reference_takes(pairs):
    ours, reference = pairs["sd15"]
    rows = [[49406, 320, 2368, 49407], [49406, 3306, 256, 49407]]
    for ids in (
        320,
        rows[0],
        tuple(rows[0]),
        rows,
        [],
        torch.tensor(rows),
        torch.tensor(rows[0]),
        np.array(rows),
        [rows[0]],
    ):
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.batch_decode(ids, skip_special_tokens=True) == reference.batch_decode(ids, skip_special_tokens=True)


def test_saved_folder_is_the_same_tokenizer(pairs, tmp_path):
    for name in ("xl2", "inversion of 4.34", "small"):
        ours, reference = pairs[name]
        whole, legacy = tmp_path / name, tmp_path / f"{name} without tokenizer.json"
        ours.save_pretrained(whole)
        shutil.copytree(whole, legacy)
        (legacy / "tokenizer.json").unlink()
        for folder in (whole, legacy):
            for again in (CLIPTokenizer.read_from(folder), transformers.CLIPTokenizer.from_pretrained(folder)):
                assert again(PROMPTS).input_ids == reference(PROMPTS).input_ids
                assert again.get_vocab() == reference.get_vocab()
                assert again.decode(again(PROMPTS[-1]).input_ids, skip_special_tokens=True) == reference.decode(
                    reference(PROMPTS[-1]).input_ids, skip_special_tokens=True
                )
                assert (again.pad_token, again.model_max_length) == (reference.pad_token, reference.model_max_length)


def test_from_and_save_pretrained(folders, pairs, tmp_path):
    ours = CLIPTokenizer.from_pretrained(str(folders["xl2"].parent), subfolder="xl2")
    ours.save_pretrained(str(tmp_path / "out"))
    again = CLIPTokenizer.from_pretrained(str(tmp_path / "out"))
    assert ours(PROMPTS).input_ids == again(PROMPTS).input_ids == pairs["xl2"][1](PROMPTS).input_ids


def test_clip_vocabulary_is_whole(pairs):
    vocab, merges = clip_vocabulary()
    assert (len(vocab), len(merges)) == (49408, 48894)
    assert vocab["!"] == 0 and vocab["!</w>"] == 256 and vocab["in"] == 512 and vocab["<|endoftext|>"] == 49407
    assert CLIPTokenizer(vocab, merges, model_max_length=77)("a cat!").input_ids == pairs["sd15"][1]("a cat!").input_ids


def test_inert_keys_change_nothing(folders, pairs, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "inert")
    values = {key: 7 if "length" in key else "x" for key in TokenizerConfig.inert}
    values |= {
        "add_prefix_space": True,
        "do_lower_case": False,
        "clean_up_tokenization_spaces": True,
        "errors": "strict",
    }
    change(folder, CONFIG, **values)
    ours = CLIPTokenizer.read_from(folder)
    for key in ("tokenizer_file", "backend"):  # transformers writes those itself, and never these values
        change(folder, CONFIG, **{key: ...})
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    for text in PROMPTS:
        assert_same(ours, reference, text)
        assert ours(text).input_ids == pairs["sd15"][1](text).input_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": 5}, TypeError, "text=5"),
        ({"text": ["a", None]}, TypeError, r"text=\['a', None\]"),
        ({"text": b"a"}, TypeError, "text=b'a'"),
        ({"text": []}, ValueError, "text is an empty list"),
        ({"text": "\ud800"}, ValueError, "surrogates"),
        ({"text": "a", "padding": "left"}, ValueError, "padding='left'"),
        ({"text": "a", "padding": None}, ValueError, "padding=None"),
        ({"text": "a", "truncation": "only_first"}, ValueError, "truncation='only_first'"),
        ({"text": "a", "return_tensors": "tf"}, ValueError, "return_tensors='tf'"),
        ({"text": "a", "max_length": 1}, ValueError, "max_length=1"),
        ({"text": "a", "max_length": 0, "add_special_tokens": False}, ValueError, "max_length=0"),
        ({"text": "a", "max_length": 7.0}, ValueError, "max_length=7.0"),
    ],
)
def test_bad_arguments(pairs, options, error, message):
    with pytest.raises(error, match=message):
        pairs["small"][0](**options)


def test_bad_ids_and_attributes(pairs):
    ours = pairs["small"][0]
    with pytest.raises(ValueError, match="-1"):
        ours.decode([3, -1])
    with pytest.raises(TypeError):
        ours.decode("ab")
    with pytest.raises(AttributeError, match="token_type_ids"):
        ours("a").token_type_ids  # noqa: B018
    unlimited = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    for options in ({"padding": "max_length"}, {"truncation": True}):
        with pytest.raises(ValueError, match="max_length is needed"):
            unlimited("a", **options)


def replace(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


BPE = {"type": "BPE", "vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}, "merges": []}


@pytest.mark.parametrize(
    ("damage", "error", "names"),
    [
        (lambda f: (f / MERGES).unlink(), LoadError, [MERGES]),
        (lambda f: (f / VOCAB).unlink(), LoadError, [VOCAB]),
        (lambda f: (f / CONFIG).unlink(), LoadError, [CONFIG]),
        (lambda f: replace(f, VOCAB, '{"a": 0,'), LoadError, [VOCAB, "JSON"]),
        (lambda f: replace(f, VOCAB, '["a"]'), LoadError, [VOCAB, "object"]),
        (lambda f: change(f, VOCAB, a="0"), LoadError, [VOCAB, "ids"]),
        (lambda f: change(f, VOCAB, a=[0]), LoadError, [VOCAB, "ids"]),
        (lambda f: change(f, VOCAB, a=-1), LoadError, [VOCAB, "ids"]),
        (lambda f: change(f, VOCAB, a=2**40), LoadError, [VOCAB, "ids"]),
        (lambda f: change(f, VOCAB, a=True), LoadError, [VOCAB, "ids"]),
        (lambda f: change(f, VOCAB, new=0), LoadError, [VOCAB, "different"]),
        (lambda f: change(f, VOCAB, **{"<|startoftext|>": ...}), LoadError, [VOCAB, "<|startoftext|>", "bos_token"]),
        (lambda f: change(f, VOCAB, **{"<|endoftext|>": ...}), LoadError, [VOCAB, "<|endoftext|>", "eos_token"]),
        (lambda f: change(f, CONFIG, unk_token="<unk>"), LoadError, [VOCAB, "<unk>", "unk_token"]),
        (lambda f: change(f, CONFIG, pad_token="<pad>"), LoadError, [VOCAB, "<pad>", "pad_token"]),
        (lambda f: replace(f, MERGES, "#version: 0.2\na b\na b c\n"), LoadError, [MERGES, "'a b c'"]),
        (lambda f: replace(f, MERGES, "a b\n\n"), LoadError, [MERGES, "''"]),
        (lambda f: replace(f, MERGES, "日 本\n"), LoadError, ["merges", "日"]),
        (lambda f: (f / MERGES).write_bytes(b"\xff\xfe"), LoadError, [MERGES, "utf-8"]),
        (lambda f: (f / VOCAB).write_bytes(b"\xff\xfe"), LoadError, [VOCAB, "utf-8"]),
        (lambda f: replace(f, CONFIG, "nonsense"), LoadError, [CONFIG, "JSON"]),
        (lambda f: change(f, CONFIG, merges_norm=3), ConfigError, [CONFIG, "merges_norm=3"]),
        (lambda f: change(f, CONFIG, padding_side="left"), ConfigError, [CONFIG, "padding_side='left'"]),
        (lambda f: change(f, CONFIG, tokenizer_class="T5Tokenizer"), ConfigError, [CONFIG, "T5Tokenizer"]),
        (lambda f: change(f, CONFIG, model_max_length="77"), ConfigError, [CONFIG, "model_max_length='77'"]),
        (lambda f: change(f, CONFIG, bos_token=5), ConfigError, [CONFIG, "bos_token=5"]),
        (lambda f: change(f, CONFIG, pad_token={"lstrip": True}), ConfigError, [CONFIG, "pad_token", "content"]),
        (lambda f: change(f, CONFIG, pad_token={"content": "a", "x": 1}), ConfigError, [CONFIG, "pad_token", "x"]),
        (lambda f: change(f, CONFIG, extra_special_tokens={"a": "b"}), ConfigError, [CONFIG, "extra_special_tokens"]),
        (lambda f: change(f, CONFIG, added_tokens_decoder={"x": {}}), ConfigError, [CONFIG, "added_tokens_decoder"]),
        (lambda f: change(f, CONFIG, added_tokens_decoder={"999": {"content": "<new>"}}), LoadError, ["<new>", "999"]),
        (lambda f: change(f, MAP, mask_token="a"), ConfigError, [MAP, "mask_token='a'"]),
        (lambda f: replace(f, MAP, "[]"), LoadError, [MAP, "object"]),
        (lambda f: change(f, "added_tokens.json", new="1"), LoadError, ["added_tokens.json"]),
        (lambda f: change(f, "added_tokens.json", new=999), LoadError, ["new", "999"]),
        (lambda f: replace(f, "tokenizer.json", "{"), LoadError, ["tokenizer.json", "JSON"]),
        (lambda f: change(f, "tokenizer.json", added_tokens=[]), LoadError, ["tokenizer.json", "model"]),
        (lambda f: change(f, "tokenizer.json", model=BPE), LoadError, ["tokenizer.json", "added_tokens"]),
        (
            lambda f: change(f, "tokenizer.json", model={**BPE, "merges": [3]}, added_tokens=[]),
            LoadError,
            ["tokenizer.json", "merge 1", "3"],
        ),
        (
            lambda f: change(f, "tokenizer.json", model={**BPE, "merges": ["a a"]}, added_tokens=[]),
            LoadError,
            ["tokenizer.json", "merges", "aa"],
        ),
        (
            lambda f: change(f, "tokenizer.json", model={**BPE, "vocab": [["a", -0.5]]}, added_tokens=[]),
            LoadError,
            ["tokenizer.json", "ids"],
        ),
    ],
)
def test_damaged_folders(folders, tmp_path, damage, error, names):
    folder = shutil.copytree(folders["small"], tmp_path / "damaged")
    CLIPTokenizer.read_from(folder)
    damage(folder)
    with pytest.raises(error) as caught:
        CLIPTokenizer.read_from(folder)
    for name in names:
        assert name in str(caught.value)
