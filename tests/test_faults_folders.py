"""Damaged and hostile folders: each ends in LoadError or ConfigError with the file's name, soon, in little memory."""

import json
import pickle
import resource
import shutil
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minidiff as m

SECONDS, BYTES = 5, 2**30
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
TOKENIZER = ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json")
TOKENIZER_4 = ("tokenizer/vocab.json", "tokenizer/special_tokens_map.json")  # read where there is no tokenizer.json
JSONS = ("model_index.json", *CONFIGS, *TOKENIZER, *TOKENIZER_4)


@pytest.fixture
def folder(tiny_sd_folder, tmp_path):
    return shutil.copytree(tiny_sd_folder, tmp_path / "sd")


def load(folder):
    """Within the time (of the processor: the machine may be busy) and the memory that a damaged folder may cost."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return m.StableDiffusionPipeline.from_pretrained(folder)
    finally:
        assert time.process_time() - start < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


def check_refused(folder, file, *said):
    """Raises one of the project's own errors, with the file's name, and `said` besides."""
    with pytest.raises((m.LoadError, m.ConfigError)) as caught:
        load(folder)
    for text in (file, *said):
        assert text in str(caught.value), f"{text!r} isn't in: {caught.value}"
    assert len(str(caught.value)) < 2000


def target(folder, file):
    if file in TOKENIZER_4:
        (folder / "tokenizer/tokenizer.json").unlink()
        config = json.loads((folder / TOKENIZER[0]).read_text())
        del config["added_tokens_decoder"]  # else it stands for special_tokens_map.json
        (folder / TOKENIZER[0]).write_text(json.dumps(config))
    return folder / file


# JSON


BROKEN = {
    "empty": b"",
    "a list": b"[]",
    "a string": b'"text"',
    "null": b"null",
    "a number": b"1",
    "not JSON": b"{'key': 1}",
    "not UTF-8": b'{"key": "\xff\xfe"}',
    "UTF-16": '{"key": 1}'.encode("utf-16"),
    "NUL": b"\x00" * 100,
    "deep": b'{"key": ' + b"[" * 100_000,
    "deep and closed": b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "10 MB": b'{"key": "' + b"x" * 10_000_000 + b'"}',
    "10 MB of spaces": b'{"key":' + b" " * 10_000_000 + b"1}",
    "a number of a million digits": b'{"key": 1' + b"0" * 1_000_000 + b"}",
    "weights": struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("file", JSONS)
def test_broken_json(folder, file, damage):
    target(folder, file).write_bytes(BROKEN[damage])
    check_refused(folder, file)


@pytest.mark.parametrize("file", JSONS)
@given(st.data())
@settings(max_examples=5)
def test_cut_json(tiny_sd_folder, tmp_path_factory, file, data):
    folder = shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("cut") / "sd")
    file_path = target(folder, file)
    whole = file_path.read_bytes().rstrip()
    file_path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    check_refused(folder, file)


@pytest.mark.parametrize("file", [file for file in JSONS if file != "tokenizer/special_tokens_map.json"])
@pytest.mark.parametrize("damage", ("missing", "a folder", "a dangling link"))
def test_absent_json(folder, file, damage):
    path = target(folder, file)
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    if damage == "a dangling link":
        path.symlink_to("nowhere")
    if file == "tokenizer/tokenizer.json" and damage == "missing":
        (folder / "tokenizer/vocab.json").unlink()  # which would stand for it
        file = "vocab.json"
    check_refused(folder, file)


@pytest.mark.parametrize("key", ("unknown_key", "größe", "\u202e", "a\nb", "x" * 500, ""))
@pytest.mark.parametrize("file", (*CONFIGS, TOKENIZER[0]))
def test_unknown_keys(folder, edit_json, file, key):
    edit_json(folder / file, **{key: 1})
    check_refused(folder, file, key)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(-5, 5), st.none(), st.text(max_size=3)), max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.parametrize("file", JSONS)
@given(st.data())
def test_retyped_values(tiny_sd_folder, tmp_path_factory, file, data):
    """Any key with any value: it is refused, with file and key, or is a legal value of that key, and loads."""
    folder = shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("typed") / "sd")
    path = target(folder, file)
    values = json.loads(path.read_text(encoding="utf-8"))
    key = data.draw(st.sampled_from(sorted(values)))
    path.write_text(json.dumps({**values, key: data.draw(JUNK)}), encoding="utf-8")
    try:
        load(folder)
    except (m.LoadError, m.ConfigError) as error:
        if file in str(error):
            assert key in str(error), str(error)
        else:  # a legal value can make a model of another shape, which its weights don't fit
            component = key if file == "model_index.json" else file.split("/")[0]
            assert f"{component}/" in str(error), str(error)


SIZES = {
    "unet/config.json": ("layers_per_block", "transformer_layers_per_block", "block_out_channels", "in_channels"),
    "vae/config.json": ("layers_per_block", "block_out_channels", "latent_channels"),
    "text_encoder/config.json": ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"),
    "scheduler/scheduler_config.json": ("num_train_timesteps",),
}


@pytest.mark.parametrize("size", (10**7, 10**12, 2**62, 2**70))
@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in SIZES.items() for key in keys])
def test_sizes_that_would_take_hours_or_overflow(folder, edit_json, file, key, size):
    value = [4, 4 * size] if key == "block_out_channels" else size
    edit_json(folder / file, **{key: value})
    check_refused(folder, file, key)


# Safetensors


@pytest.mark.parametrize("file", WEIGHTS)
@given(st.data())
@settings(max_examples=10)
def test_cut_weights(tiny_sd_folder, tmp_path_factory, file, data):
    folder = shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("cut") / "sd")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    check_refused(folder, file)


@pytest.mark.parametrize("length", (0, 1, 7, 100, 10**6, 2**31, 2**40, 2**63, 2**64 - 1))
@pytest.mark.parametrize("file", WEIGHTS)
def test_lying_header_lengths(folder, file, length):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(struct.pack("<Q", length) + whole[8:])
    check_refused(folder, file)


def rewrite_header(path, change):
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def first(header):
    return next(name for name in sorted(header) if name != "__metadata__")


HEADERS = {
    "another shape": lambda header, name: header[name].update(shape=[*header[name]["shape"], 1]),
    "a negative shape": lambda header, name: header[name].update(shape=[-1]),
    "a huge shape": lambda header, name: header[name].update(shape=[2**60]),
    "an unknown dtype": lambda header, name: header[name].update(dtype="XYZ"),
    "a wider dtype": lambda header, name: header[name].update(dtype="F64"),
    "integers": lambda header, name: header[name].update(dtype="I32"),
    "offsets behind the end": lambda header, name: header[name].update(data_offsets=[0, 2**40]),
    "offsets that overlap": lambda header, name: header[name].update(data_offsets=[0, 4]),
    "offsets backwards": lambda header, name: header[name].update(data_offsets=[8, 4]),
    "no offsets": lambda header, name: header[name].pop("data_offsets"),
    "another name": lambda header, name: header.update({"stranger.weight": header.pop(name)}),
    "a missing tensor": lambda header, name: header.pop(name),
    "a list": lambda header, name: header.update({name: []}),
    "metadata of another type": lambda header, name: header.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("damage", HEADERS)
@pytest.mark.parametrize("file", WEIGHTS)
def test_wrong_headers(folder, file, damage):
    rewrite_header(folder / file, lambda header: HEADERS[damage](header, first(header)))
    check_refused(folder, file)


def rewrite_tensors(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


TENSORS = {
    "a tensor too many": lambda tensors: tensors.update({"stranger.weight": torch.zeros(1)}),
    "a tensor too few": lambda tensors: tensors.pop(sorted(tensors)[0]),
    "nothing": lambda tensors: tensors.clear(),
    "integers": lambda tensors: tensors.update({name: tensor.to(torch.int32) for name, tensor in tensors.items()}),
    "booleans": lambda tensors: tensors.update({name: tensor > 0 for name, tensor in tensors.items()}),
}


@pytest.mark.parametrize("damage", TENSORS)
@pytest.mark.parametrize("file", WEIGHTS)
def test_wrong_tensors(folder, file, damage):
    rewrite_tensors(folder / file, TENSORS[damage])
    check_refused(folder, file)


@pytest.mark.parametrize("file", WEIGHTS)
@given(st.data())
@settings(max_examples=10)
def test_flipped_bytes_of_the_header(tiny_sd_folder, tmp_path_factory, file, data):
    """Refused, or the same model: a flip in the metadata or between the tensors changes nothing."""
    folder = shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("flip") / "sd")
    whole = bytearray((folder / file).read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    at = data.draw(st.integers(0, 8 + length - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (folder / file).write_bytes(whole)
    try:
        load(folder)
    except (m.LoadError, m.ConfigError) as error:
        assert file in str(error)


@pytest.mark.parametrize("damage", ("missing", "a folder", "a dangling link"))
@pytest.mark.parametrize("file", WEIGHTS)
def test_absent_weights(folder, file, damage):
    (folder / file).unlink()
    if damage == "a folder":
        (folder / file).mkdir()
    if damage == "a dangling link":
        (folder / file).symlink_to("nowhere")
    check_refused(folder, file.split("/")[0])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("file", WEIGHTS)
def test_weights_that_are_not_finite(folder, file, value):
    """They load, since weights aren't read before they are used; the run then says from which step on."""
    rewrite_tensors(folder / file, lambda tensors: [tensor.fill_(value) for tensor in tensors.values()])
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    where = "pictures" if file.startswith("vae") else "step 1 of 4"
    with pytest.raises(FloatingPointError, match=where):
        pipe("a red apple", num_inference_steps=3)


# Indices of shards


def shard(folder, **changes):
    """unet's weights as one shard with an index, and the index then changed."""
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}, **changes}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_a_whole_index_is_read(folder):
    shard(folder)
    load(folder)


@pytest.mark.parametrize(
    "name",
    (
        "../vae/diffusion_pytorch_model.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../b",
        "..\\vae",
        "missing",
        "a\0b",
    ),
)
def test_shards_outside_the_folder(folder, name):
    shard(folder, weight_map={"conv_in.weight": name})
    check_refused(folder, "unet")


@pytest.mark.parametrize("weight_map", (None, [], "x", {"conv_in.weight": 1}, {"conv_in.weight": None}, {}))
def test_wrong_indices(folder, weight_map):
    shard(folder, weight_map=weight_map)
    check_refused(folder, "unet/diffusion_pytorch_model.safetensors.index.json")


# Pickles


class Bomb:
    """A pickle that runs code when it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("how", ("torch", "pickle"))
def test_code_in_pickles_does_not_run(folder, tmp_path, how):
    (folder / WEIGHTS[0]).unlink()
    file = folder / "unet/diffusion_pytorch_model.bin"
    bomb = {"conv_in.weight": Bomb(f"touch {tmp_path}/ran")}
    if how == "torch":
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    check_refused(folder, "unet/diffusion_pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


PICKLES = {
    "empty": b"",
    "text": b"weights",
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "a list": [torch.zeros(1)],
    "a tensor": torch.zeros(1),
    "numbers": {"conv_in.weight": 1},
    "names that are numbers": {1: torch.zeros(1)},
    "a training checkpoint": {"state_dict": {"conv_in.weight": torch.zeros(1)}, "epoch": 3},
}


@pytest.mark.parametrize("damage", PICKLES)
def test_wrong_pickles(folder, damage):
    (folder / WEIGHTS[0]).unlink()
    file, content = folder / "unet/diffusion_pytorch_model.bin", PICKLES[damage]
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    check_refused(folder, "unet/diffusion_pytorch_model.bin")


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=10)
def test_cut_pickles(tiny_sd_folder, tmp_path_factory, share):
    folder = shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("cut") / "sd")
    (folder / WEIGHTS[0]).unlink()
    file = folder / "unet/diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    check_refused(folder, "unet/diffusion_pytorch_model.bin")


# model_index.json


@pytest.mark.parametrize(
    "changes",
    (
        {"_class_name": "StableDiffusion3Pipeline"},
        {"_class_name": ["StableDiffusionPipeline"]},
        {"_class_name": None},
        {"unet": ["diffusers", "UNet3DModel"]},
        {"unet": ["os", "system"]},
        {"unet": ["diffusers"]},
        {"unet": ["diffusers", 1]},
        {"unet": "diffusers"},
        {"unet": 7},
        {"unet": [None, None]},
        {"unet": ["diffusers", "AutoencoderKL"]},
        {"unet": ["diffusers", "UNet2DModel"]},
        {"vae": ["diffusers", "UNet2DConditionModel"]},
        {"scheduler": ["transformers", "CLIPTextModel"]},
        {"scheduler": ["diffusers", "AutoencoderKL"]},
        {"tokenizer": ["diffusers", "PNDMScheduler"]},
        {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
        {"safety_checker": ["diffusers", "AutoencoderKL"]},
        {"../vae": ["diffusers", "AutoencoderKL"]},
        {"stranger": ["diffusers", "AutoencoderKL"]},
        {"requires_safety_checker": "perhaps"},
    ),
    ids=str,
)
def test_wrong_model_index(folder, edit_json, changes):
    """Read by `DiffusionPipeline`, which takes the class's name from the file."""
    edit_json(folder / "model_index.json", **changes)
    with pytest.raises((m.LoadError, m.ConfigError)) as caught:
        m.DiffusionPipeline.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_class_of_another_pipeline(tiny_sd_folder, tiny_ddpm_folder):
    with pytest.raises(m.LoadError, match=r"model_index.json"):
        m.StableDiffusionPipeline.from_pretrained(tiny_ddpm_folder)
    with pytest.raises(m.LoadError, match=r"model_index.json"):
        m.DDPMPipeline.from_pretrained(tiny_sd_folder)


# Names


@pytest.mark.parametrize("name", ("größe 画像", "with space", "a'b\"c", "-x", ".hidden", "%s{}", "x" * 200))
def test_folders_of_any_name(tiny_sd_folder, tmp_path, name):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / name)
    load(folder).save_pretrained(tmp_path / f"{name} 2")
    load(tmp_path / f"{name} 2")


def test_links_are_followed(tiny_sd_folder, tmp_path):
    """The Hub's own cache is made of them."""
    for file in tiny_sd_folder.rglob("*"):
        if file.is_file():
            link = tmp_path / "linked" / file.relative_to(tiny_sd_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    load(tmp_path / "linked")


@pytest.mark.parametrize("path", ("", ".", "/", "no/such/folder", "org/name/more", "a\0b", "x" * 5000, "ünï/cödé"))
def test_paths_that_are_no_pipeline(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(m.LoadError):
        m.DiffusionPipeline.from_pretrained(path, local_files_only=True)
