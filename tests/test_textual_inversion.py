"""Textual inversion beside the reference: ids, states and pictures in every form of file, and files that don't fit."""

import copy
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_lora import Evil, both
from test_pipelines import agree, draw

import minidiff
from minidiff import LoadError


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return both("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd") / "folder")


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return both("stable-diffusion-xl-base-1.0", tmp_path_factory.mktemp("xl") / "folder")


@pytest.fixture
def apart(sd):
    """Pipelines of this test's own."""
    return copy.deepcopy(sd)


def vectors(n, width=24, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def a1111(rows):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "some style", "step": 7}


FORMS = {  # what to write, under which name, and the token to give
    "diffusers": ({"<cat>": vectors(1)[0]}, "learned_embeds.safetensors", None),
    "diffusers, several": ({"<cat>": vectors(3)}, "learned_embeds.bin", None),
    "diffusers, called otherwise": ({"<cat>": vectors(2)}, "learned_embeds.safetensors", "<dog>"),
    "A1111": (a1111(vectors(1)), "style.pt", None),
    "A1111, several": (a1111(vectors(4)), "style.pt", "stylex"),
    "A1111, safetensors": ({"emb_params": vectors(2)}, "emb.safetensors", "embx"),
    "half": ({"<cat>": vectors(2).half()}, "learned_embeds.safetensors", None),
}
PROMPTS = ("a <cat> and a <dog>", "in some style, stylex of embx", "<cat><CAT>_1 <cat>_1")


def same(pipes, prompts, **options):
    """Equal ids, states and pictures."""
    for prompt in prompts:
        ids = []
        for pipe in pipes:
            converted = pipe.maybe_convert_prompt([prompt], pipe.tokenizer)
            ids.append(pipe.tokenizer(converted, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        assert torch.equal(*ids)
        with torch.no_grad():
            states = [pipe.text_encoder(ids[0]).last_hidden_state for pipe in pipes]
        assert torch.allclose(*states, atol=1e-5)
        agree(*(draw(pipe, prompt=prompt, num_inference_steps=1, **options) for pipe in pipes))


def write(folder, content, name):
    save_file(content, folder / name) if name.endswith(".safetensors") else torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file(apart, form, tmp_path):
    content, name, token = FORMS[form]
    file = write(tmp_path, content, name)
    for pipe in apart:
        pipe.load_textual_inversion(tmp_path if name.startswith("learned") else file, token=token)
    ours, theirs = (pipe.text_encoder.get_input_embeddings().weight for pipe in apart)
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)
    assert len(apart[0].tokenizer) == len(apart[1].tokenizer) == len(ours) == apart[0].text_encoder.config.vocab_size
    assert apart[0].tokenizer.added_tokens_encoder == apart[1].tokenizer.added_tokens_encoder
    same(apart, PROMPTS, negative_prompt="a <dog>")


def test_tokens_come_and_go(apart, tmp_path):
    before = apart[0].text_encoder.get_input_embeddings().weight.clone()
    expected = draw(apart[0], prompt=PROMPTS[0])[0]
    for pipe in apart:
        pipe.load_textual_inversion([{"<cat>": vectors(1)}, a1111(vectors(2))], token=["<one>", "stylex"])
        pipe.load_textual_inversion(vectors(2, seed=1), token=["<two>", "<three>"])
        pipe.load_textual_inversion({"<cat>": vectors(3, seed=2)})
        pipe.unload_textual_inversion("<one>")
    prompts = ("<one> <cat> stylex <two><three>",)
    same(apart, prompts)
    apart[0].unload_textual_inversion(["<cat>", "<two>"])  # with all its vectors; the reference leaves <cat>_1
    kept = {"stylex", "stylex_1", "<three>", "<|startoftext|>", "<|endoftext|>"}
    assert apart[0].tokenizer.added_tokens_encoder.keys() == kept
    for pipe in apart:
        pipe.unload_textual_inversion()
    same(apart, prompts)
    assert torch.equal(apart[0].text_encoder.get_input_embeddings().weight, before)
    assert np.array_equal(draw(apart[0], prompt=PROMPTS[0])[0], expected)
    apart[0].load_textual_inversion({"<cat>": vectors(2)})  # nothing of the old one is in the way


def test_a_refused_unload_takes_nothing_away(apart):
    pipe = apart[0]
    pipe.load_textual_inversion({"<x>": vectors(2)})
    with pytest.raises(ValueError, match="tokens has <zzz>, which"):
        pipe.unload_textual_inversion(["<x>", "<zzz>"])
    assert {"<x>", "<x>_1"} <= pipe.tokenizer.added_tokens_encoder.keys()
    assert len(pipe.text_encoder.get_input_embeddings().weight) == 49410


def test_xl_as_its_users_do(xl):
    """A tensor for each text encoder; or, here, the whole file."""
    ours, theirs = copy.deepcopy(xl)
    parts = {"clip_l": vectors(2), "clip_g": vectors(2, 40)}
    tokens = ["<s0>", "<s1>"]
    for pipe in (ours, theirs):
        for rows, end in zip(parts.values(), ("", "_2"), strict=True):
            own = {name: getattr(pipe, f"{name}{end}") for name in ("tokenizer", "text_encoder")}
            pipe.load_textual_inversion(rows, token=tokens, **own)
    options = {"prompt": "<s0><s1> fox", "num_inference_steps": 1}
    one, other = (draw(pipe, **options) for pipe in (ours, theirs))
    agree(one, other)
    ours.unload_textual_inversion(tokens)
    assert len(ours.tokenizer) == len(ours.tokenizer_2) == 49408
    ours.load_textual_inversion(parts, token="<s>")
    agree(draw(ours, **options | {"prompt": "<s> fox"}), other)
    with pytest.raises(ValueError, match="its token is called None"):
        ours.load_textual_inversion(parts)


def test_a_saved_pipeline_keeps_its_tokens(apart, tmp_path):
    apart[0].load_textual_inversion({"<cat>": vectors(3)})
    apart[0].save_pretrained(tmp_path)
    again = type(apart[0]).from_pretrained(tmp_path, safety_checker=None)
    theirs = type(apart[1]).from_pretrained(tmp_path, safety_checker=None)
    for pipe in (again, theirs):
        pipe.set_progress_bar_config(disable=True)
    same((again, theirs), PROMPTS[:1])
    assert np.array_equal(draw(again, prompt=PROMPTS[0])[0], draw(apart[0], prompt=PROMPTS[0])[0])


def test_tokenizer_and_text_encoder_alone(apart):
    for pipe in apart:
        assert pipe.tokenizer.add_tokens(["<a>", "<B>", "apple</w>"]) == 3  # of which one has an id
        assert pipe.tokenizer.add_tokens("<a>") == 0
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    ours, theirs = (pipe.text_encoder.get_input_embeddings() for pipe in apart)
    assert ours.num_embeddings == theirs.num_embeddings == 49410
    assert apart[0].tokenizer("<A> <b>").input_ids == apart[1].tokenizer("<A> <b>").input_ids
    apart[0].unload_textual_inversion()
    assert len(apart[0].tokenizer) == len(apart[0].text_encoder.get_input_embeddings().weight) == 49408
    apart[0].text_encoder.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"this text encoder knows 0\.\.99"):
        apart[0].text_encoder(torch.tensor([[5, 100]]))


FAULTS = {
    "wrong width": ({"<cat>": vectors(2, 25)}, r"holds a tensor of \(2, 25\); the text encoder takes"),
    "three dimensions": ({"<cat>": vectors(2)[None]}, r"\(1, 2, 24\)"),
    "none": ({"<cat>": vectors(0)}, r"\(0, 24\)"),
    "a thousand million": ({"<cat>": torch.ones(1).expand(10**9, 24)}, r"\(1000000000, 24\)"),
    "integers": ({"<cat>": torch.ones(24, dtype=torch.int64)}, "is no embedding"),
    "two keys": ({"<cat>": vectors(1), "<dog>": vectors(1)}, "is no embedding"),
    "a LoRA": ({"unet.conv_in.lora_A.weight": vectors(1), "b": vectors(1)}, "is no embedding"),
    "a list": ([1, 2], "is no embedding"),
    "A1111 without": ({"string_to_param": {}, "name": "x"}, "is no embedding"),
    "code": ({"<cat>": Evil()}, "can't be read as a file of weights alone"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(sd, fault, tmp_path, capsys):
    content, message = FAULTS[fault]
    file, state = write(tmp_path, content, "file.pt"), copy.deepcopy(sd[0].text_encoder)
    with pytest.raises(LoadError, match=message) as caught:
        sd[0].load_textual_inversion([{"<good>": vectors(2)}, file])
    assert str(file) in str(caught.value)
    assert sd[0].text_encoder.state_dict().keys() == state.state_dict().keys()
    assert all(torch.equal(t, state.state_dict()[name]) for name, t in sd[0].text_encoder.state_dict().items())
    assert len(sd[0].tokenizer) == 49408 and "code of a file" not in capsys.readouterr().out


def test_cut_files_and_wrong_arguments(sd, tmp_path):
    for name, content in (("cut.safetensors", {"<cat>": vectors(9)}), ("cut.pt", {"<cat>": vectors(9)})):
        file = write(tmp_path, content, name)
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(LoadError, match=re.escape(str(file))):
            sd[0].load_textual_inversion(file)
    for call, message in (
        (
            lambda: sd[0].load_textual_inversion({"cat": vectors(1)[0]}, token="cat</w>"),
            "'cat</w>' is in the tokenizer",
        ),
        (lambda: sd[0].load_textual_inversion([vectors(1), vectors(1)], token=["<a>", "<a>"]), "token='<a>' is in"),
        (lambda: sd[0].load_textual_inversion(vectors(1)), "its token is called None"),
        (lambda: sd[0].load_textual_inversion({"": vectors(1)}), "its token is called ''"),
        (lambda: sd[0].load_textual_inversion({"<a>": vectors(1)}, token="\t "), r"its token is called '\\t '"),
        (lambda: sd[0].load_textual_inversion({5: vectors(1)}), "its token is called 5"),
        (lambda: sd[0].load_textual_inversion([vectors(1)] * 2, token=["<A>", "<a>"]), "token='<a>' is in the tok"),
        (lambda: sd[0].load_textual_inversion([vectors(2), vectors(1)], token=["<a>", "<A>_1"]), "token='<A>_1' is in"),
        (lambda: sd[0].load_textual_inversion([vectors(1)] * 2, token=["<a>"]), "token has 1 for 2"),
        (
            lambda: sd[0].load_textual_inversion({"clip_g": vectors(1, 40)}, token="<a>"),
            "tokenizer_2 and text_encoder_2",
        ),
        (lambda: sd[0].unload_textual_inversion("<nothing>"), "tokens has <nothing>"),
        (lambda: sd[0].load_textual_inversion(tmp_path), "give weight_name"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="tokens must be a name or a list of names, not 5"):
        sd[0].unload_textual_inversion(5)
    with pytest.raises(TypeError, match="prompt must be a text"):
        sd[0].maybe_convert_prompt(5, sd[0].tokenizer)
    assert len(sd[0].tokenizer) == 49408


def test_of_a_token_with_capitals_the_reference_finds_the_first_vector_alone(apart):
    for pipe in apart[1:]:
        pipe.load_textual_inversion({"<Cat>": vectors(2)})
    with pytest.warns(UserWarning, match="token='<Cat>' gives its first vector alone, '<cat>' all"):
        apart[0].load_textual_inversion({"<Cat>": vectors(2)})
    ids = [pipe.tokenizer(pipe.maybe_convert_prompt("<Cat> <cat>", pipe.tokenizer)).input_ids for pipe in apart]
    assert ids[0] == ids[1] == [49406, 49408, 49408, 49407]


def test_prompts_without_new_tokens_are_as_they_were():
    tokenizer = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji")).tokenizer
    assert minidiff.StableDiffusionPipeline.maybe_convert_prompt(None, "a red apple", tokenizer) == "a red apple"
