"""Folders in, folders out: what is read, what is written, what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from fake_hub import REPOSITORY, FakeHub
from layouts import LAYOUTS, make_folder, relayout
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import ConfigError, DiffusionPipeline, LoadError, StableDiffusionPipeline
from minidiff.loading.folder import wanted_by_pipeline
from minidiff.loading.weights import Files
from weights_compat import TABLES

NO_CHECKER = {"safety_checker": None, "feature_extractor": None}


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return make_folder("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd") / "folder")


@pytest.fixture
def folder(sd_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sd_folder, tmp_path / "folder")


def tensors_of(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


# What is read


def test_a_pipeline_without_safety_checker(sd_folder):
    with pytest.warns(UserWarning, match="has no safety checker") as caught:
        pipe = DiffusionPipeline.from_pretrained(sd_folder, **NO_CHECKER)
    assert len(caught) == 1
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert list(pipe.components)[:5] == ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
    assert not any(model.training for model in (pipe.vae, pipe.text_encoder, pipe.unet))


def test_parts_given_by_name_are_not_read(folder):
    for name in ("unet", "scheduler"):
        shutil.rmtree(folder / name)
    unet = minidiff.UNet2DConditionModel.from_config({"block_out_channels": [32] * 4, "sample_size": 8})
    scheduler = minidiff.DDIMScheduler()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"unet": unet, "scheduler": scheduler, "requires_safety_checker": False, **NO_CHECKER}
        pipe = DiffusionPipeline.from_pretrained(folder, **given)
    assert pipe.unet is unet
    with pytest.raises(TypeError, match="has no vea; it takes vae"):
        DiffusionPipeline.from_pretrained(folder, vea=None)


def test_weights_of_every_component_land_where_they_belong(sd_folder):
    pipe = DiffusionPipeline.from_pretrained(sd_folder, **NO_CHECKER)
    for name in ("unet", "vae", "text_encoder"):
        model = getattr(pipe, name)
        table = TABLES[type(model).__name__]
        file = tensors_of(sd_folder, name)
        assert {table.hub(ours) for ours in model.state_dict()} == file.keys()
        for ours, tensor in model.state_dict().items():
            assert torch.equal(tensor, file[table.hub(ours)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_tensors(layout, sd_folder, folder):
    expected = minidiff.AutoencoderKL.from_pretrained(sd_folder, subfolder="vae").state_dict()
    for file in folder.glob("*/*.safetensors"):
        relayout(file, layout)
    options = {"variant": "fp16"} if layout == "fp16" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **options, **NO_CHECKER)
    for name, tensor in pipe.vae.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float() if layout == "fp16" else expected[name])


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_dtype(sd_folder, name):
    pipe = DiffusionPipeline.from_pretrained(sd_folder, **{name: torch.bfloat16}, **NO_CHECKER)
    assert {p.dtype for model in (pipe.unet, pipe.vae, pipe.text_encoder) for p in model.parameters()} == {
        torch.bfloat16
    }
    assert pipe.dtype == torch.bfloat16 and pipe.device == torch.device("cpu")
    assert pipe.to(torch.float64).unet.dtype == pipe.vae.dtype == torch.float64


def test_variant_of_some_components(folder):
    relayout(folder / "unet/diffusion_pytorch_model.safetensors", "fp16")
    with pytest.warns(UserWarning, match=r"vae: has no variant 'fp16'"):
        DiffusionPipeline.from_pretrained(folder, variant="fp16", **NO_CHECKER)
    with pytest.raises(LoadError, match=r"unet: no weights found.*diffusion_pytorch_model.fp16.safetensors"):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    with pytest.raises(LoadError, match="no component has weights of the variant 'bf16'"):
        DiffusionPipeline.from_pretrained(folder, variant="bf16", **NO_CHECKER)


def test_use_safetensors(folder):
    unet = folder / "unet"
    relayout(shutil.copy(unet / "diffusion_pytorch_model.safetensors", unet / "copy.safetensors"), "pickle")
    (unet / "copy.bin").rename(unet / "diffusion_pytorch_model.bin")
    for choice in (None, True, False):
        minidiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=choice)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(LoadError, match="no weights found"):
        minidiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)


def test_single_components(sd_folder):
    unet = minidiff.UNet2DConditionModel.from_pretrained(str(sd_folder / "unet"))
    same = minidiff.UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), same.parameters(), strict=True))
    scheduler = minidiff.DDIMScheduler.from_pretrained(sd_folder, subfolder="scheduler")  # the folder says PNDM
    assert scheduler.config.steps_offset == 1 and scheduler.config.clip_sample is False
    tokenizer = minidiff.CLIPTokenizer.from_pretrained(sd_folder, subfolder="tokenizer")
    assert tokenizer("hello!").input_ids == [49406, 3306, 256, 49407]
    with pytest.raises(LoadError, match="_class_name='AutoencoderKL', but a UNet2DConditionModel"):
        minidiff.UNet2DConditionModel.from_pretrained(sd_folder, subfolder="vae")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_are_mapped_not_copied(suffix, tmp_path):
    """They stay pages of the file, after each has been read too: no anonymous memory."""
    minidiff.CLIPTextModel(hidden_size=512, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    if suffix == "bin":
        relayout(tmp_path / "model/model.safetensors", "pickle")
    script = f"""
import minidiff, re
def anonymous():
    return int(re.search(r"Anonymous: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])
before = anonymous()
model = minidiff.CLIPTextModel.from_pretrained({str(tmp_path / "model")!r})
total = sum(p.sum() for p in model.parameters())
print(sum(p.nbytes for p in model.parameters()) // 1024, anonymous() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    weights, grown = map(int, out.split())
    assert weights > 100_000
    assert grown < weights - 10_000  # loading's own needs are below the weights by far, but not nothing


# The Hub


@pytest.fixture
def hub(sd_folder, tmp_path, monkeypatch):
    source = shutil.copytree(sd_folder, tmp_path / "hub")
    for file in source.glob("*/*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"))
        relayout(shutil.copy(file, file.with_name("copy.safetensors")), "pickle")
        file.with_name("copy.bin").rename(file.with_suffix(".bin"))
    (source / "safety_checker/model.safetensors").write_bytes(b"large")
    (source / "v1-5-pruned.safetensors").write_bytes(b"larger")
    (source / "README.md").write_text("a card")
    with FakeHub(source) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def test_hub_downloads_only_what_it_reads(hub, tmp_path, sd_folder):
    cache = {"cache_dir": tmp_path / "cache"}
    pipe = DiffusionPipeline.from_pretrained(REPOSITORY, **cache, **NO_CHECKER)
    weights = {name for name in hub.downloaded if not re.search(r"\.(json|txt)$", name)}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert not any(name.startswith(("safety_checker/", "feature_extractor/")) for name in hub.downloaded)
    local = DiffusionPipeline.from_pretrained(sd_folder, **NO_CHECKER)
    for mine, theirs in zip(pipe.unet.parameters(), local.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    hub.downloaded.clear()
    DiffusionPipeline.from_pretrained(REPOSITORY, **cache, **NO_CHECKER, local_files_only=True)
    assert not hub.downloaded
    DiffusionPipeline.from_pretrained(REPOSITORY, **cache, **NO_CHECKER, variant="fp16", revision="main")
    assert hub.downloaded == {name.replace(".safetensors", ".fp16.safetensors") for name in weights}


def test_hub_single_component_and_offline(hub, tmp_path, monkeypatch):
    cache = {"cache_dir": tmp_path / "cache"}
    minidiff.AutoencoderKL.from_pretrained(REPOSITORY, subfolder="vae", **cache)
    assert hub.downloaded == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    minidiff.AutoencoderKL.from_pretrained(REPOSITORY, subfolder="vae", **cache)
    with pytest.raises(LoadError, match=r"org/model: no such folder here.*unet/config\.json"):
        minidiff.UNet2DConditionModel.from_pretrained(REPOSITORY, subfolder="unet", **cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.__exit__()  # the network goes away: the cache still serves
    minidiff.AutoencoderKL.from_pretrained(REPOSITORY, subfolder="vae", **cache)
    with pytest.raises(LoadError, match=r"org/other: no such folder here, and not to be had from the Hub"):
        minidiff.AutoencoderKL.from_pretrained("org/other", **cache)


def test_components_at_the_root(tmp_path):
    """google/ddpm-cifar10-32 and its like hold the unet's and the scheduler's files beside model_index.json."""
    nested = make_folder("ddpm-cifar10-32", tmp_path / "nested")
    flat = shutil.copytree(nested, tmp_path / "flat")
    for file in [*flat.glob("unet/*"), *flat.glob("scheduler/*")]:
        file.rename(flat / file.name)
    for name in ("unet", "scheduler"):
        (flat / name).rmdir()
    expected = DiffusionPipeline.from_pretrained(nested)
    pipe = DiffusionPipeline.from_pretrained(flat)
    assert pipe.scheduler.config == expected.scheduler.config
    for mine, theirs in zip(pipe.unet.parameters(), expected.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    reference = diffusers.DiffusionPipeline.from_pretrained(flat)
    assert sum(p.numel() for p in reference.unet.parameters()) == sum(p.numel() for p in pipe.unet.parameters())
    names = [file.relative_to(flat).as_posix() for file in flat.rglob("*") if file.is_file()]
    wanted = wanted_by_pipeline([*names, "README.md"], Files(), {})
    assert sorted(wanted) == sorted(names)


def test_several_models_at_the_root(tiny_sd_folder, tmp_path):
    """Each writes the last one's config.json and weights over: the reference fills every network from what is left."""
    flat = shutil.copytree(tiny_sd_folder, tmp_path / "flat")
    for file in [*flat.glob("*/*")]:
        file.replace(flat / file.name)
    for folder in [folder for folder in flat.iterdir() if folder.is_dir()]:
        folder.rmdir()
    with pytest.raises(LoadError, match=r"flat: .*text_encoder.* have no folders: config\.json .* one model's alone"):
        DiffusionPipeline.from_pretrained(flat)


def test_a_scheduler_config_that_was_made_of_a_pipelines(tiny_sd_folder, tmp_path):
    """`from_config(pipe.config)` and a save leave such a file: the reference drops what it doesn't know."""
    index = json.loads((tiny_sd_folder / "model_index.json").read_text()) | {"image_encoder": [None, None]}
    file = {"beta_start": 0.001, **index, "_class_name": "DDIMScheduler"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    with pytest.warns(UserWarning, match=r"scheduler_config\.json: .*unet.* belong to a pipeline, and are left out"):
        ours = minidiff.DDIMScheduler.from_pretrained(tmp_path)
    assert dict(ours.config) == dict(minidiff.DDIMScheduler(beta_start=0.001).config)
    assert torch.equal(ours.betas, diffusers.DDIMScheduler.from_pretrained(tmp_path).betas)


def test_no_such_folder():
    with pytest.raises(LoadError, match=r"\./nowhere: there is no such folder"):
        DiffusionPipeline.from_pretrained("./nowhere")
    with pytest.raises(TypeError, match="must be a folder or a Hub id, not int"):
        DiffusionPipeline.from_pretrained(3)


# What is written


@pytest.mark.parametrize("repository", ["stable-diffusion-v1-5", "stable-diffusion-2-1", "ddpm-butterflies-128"])
def test_the_reference_loads_what_is_saved(repository, tmp_path):
    source = make_folder(repository, tmp_path / "source", seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = DiffusionPipeline.from_pretrained(source, **NO_CHECKER if "v1-5" in repository else {})
    ours.save_pretrained(tmp_path / "saved")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    original = diffusers.DiffusionPipeline.from_pretrained(source, safety_checker=None, torch_dtype=torch.float32)
    for name, component in ours.components.items():
        if isinstance(component, torch.nn.Module):
            saved, before = getattr(theirs, name), getattr(original, name)
            assert saved.state_dict().keys() == before.state_dict().keys()
            assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), before.parameters(), strict=True))
            file, file_before = (tensors_of(folder, name) for folder in (tmp_path / "saved", source))
            assert file.keys() == file_before.keys()
        for config in ("config.json", "scheduler_config.json"):
            if (source / name / config).exists() and component is not None:
                saved, before = (json.loads((f / name / config).read_text()) for f in (tmp_path / "saved", source))
                shared = {key for key in saved.keys() & before.keys() if not key.startswith("_")}
                assert len(shared) > 5
                assert {key: saved[key] for key in shared} == {key: before[key] for key in shared}
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    arguments |= {"prompt": "a cat"} if "stable" in repository else {}
    pictures = [
        pipe(generator=torch.Generator().manual_seed(0), **arguments).images for pipe in (ours, theirs, original)
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 1e-4
    assert abs(pictures[1] - pictures[2]).max() <= 1e-5  # equal tensors; convolutions on the CPU aren't bit-stable


def test_half_precision_is_saved_as_it_is(sd_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sd_folder, torch_dtype=torch.float16, **NO_CHECKER)
    pipe.save_pretrained(tmp_path / "saved", variant="fp16")
    text_encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "saved/text_encoder", variant="fp16")
    assert text_encoder.dtype == torch.float16
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", variant="fp16", torch_dtype=torch.float16)
    for mine, theirs in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_save_leaves_other_files_and_other_variants(folder):
    (folder / "README.md").write_text("mine")
    (folder / "unet/notes.txt").write_text("mine too")
    (folder / "images").mkdir()
    (folder / "images/a.png").symlink_to("../README.md")
    shutil.copy(folder / UNET, (folder / UNET).with_suffix(".fp16.safetensors"))
    relayout(folder / "vae/diffusion_pytorch_model.safetensors", "shards")
    pipe = DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    pipe.save_pretrained(folder)
    assert (folder / "README.md").read_text() == (folder / "images/a.png").read_text() == "mine"
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").exists()
    assert sorted(os.listdir(folder / "vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert (folder / "safety_checker/config.json").exists()
    assert sorted(os.listdir(folder.parent)) == ["folder"]  # nothing half-done beside it
    DiffusionPipeline.from_pretrained(folder)


def test_a_save_through_a_link_replaces_what_it_points_to(folder):
    (folder.parent / "link").symlink_to("folder")
    pipe = DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    for _ in range(2):
        pipe.save_pretrained(folder.parent / "link")
    assert sorted(os.listdir(folder.parent)) == ["folder", "link"] and (folder.parent / "link").is_symlink()
    DiffusionPipeline.from_pretrained(folder)


def test_a_failed_save_changes_nothing(folder, monkeypatch):
    pipe = DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("minidiff.loading.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert os.listdir(folder.parent) == ["folder"]


def test_what_can_not_be_saved(sd_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sd_folder, **NO_CHECKER)
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        pipe.save_pretrained(tmp_path / "saved", safe_serialization=False)
    with pytest.raises(ValueError, match="variant must be a word"):
        pipe.save_pretrained(tmp_path / "saved", variant="../x")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(TypeError, match="scheduler is a EulerDiscreteScheduler"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not os.listdir(tmp_path)


# What is refused


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UNET = "unet/diffusion_pytorch_model.safetensors"
BROKEN = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"model_index\.json: no such file"),
    "index is no JSON": (lambda f: cut(f / "model_index.json"), r"model_index\.json: not valid JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json: must hold an object"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), r"unet/config\.json: no such file"),
    "config is no JSON": (lambda f: cut(f / "unet/config.json"), r"unet/config\.json: not valid JSON"),
    "no scheduler config": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        r"_config\.json: no such file",
    ),
    "no weights": (lambda f: (f / UNET).unlink(), r"unet: no weights found; looked for diffusion_pytorch_model"),
    "truncated weights": (lambda f: cut(f / UNET), rf"{UNET}: not a whole safetensors file"),
    "no merges": (lambda f: (f / "tokenizer/merges.txt").unlink(), r"merges\.txt"),
    "a tensor too few": (
        lambda f: change_tensors(f / UNET, lambda t: t.pop("conv_in.bias")),
        r"unet.*1 tensors are missing, the first is conv_in\.bias",
    ),
    "a tensor too many": (
        lambda f: change_tensors(f / UNET, lambda t: t.update({"conv_in.scale": torch.zeros(1)})),
        r"the tensor conv_in\.scale has no place in UNet2DConditionModel",
    ),
    "a wrong shape": (
        lambda f: change_tensors(f / UNET, lambda t: t.update({"conv_in.bias": torch.zeros(7)})),
        r"conv_in\.bias has shape \(7,\); config\.json makes it \(32,\)",
    ),
    "a wrong dtype": (
        lambda f: change_tensors(f / UNET, lambda t: t.update({"conv_in.bias": torch.zeros(32).int()})),
        r"conv_in\.bias is torch\.int32",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name, folder):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(LoadError, match=message) as caught:
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "unknown class 'UNet3DConditionModel'.*UNet2DModel",
        ),
        ({"unet": "diffusers"}, r"model_index\.json: unet='diffusers' must be"),
        ({"unet": ["diffusers", 3]}, r"unet=\['diffusers', 3\] must be \[library, class\]"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet is not supported"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "_class_name='StableDiffusion3Pipeline' is not supported"),
        ({"_class_name": None}, "_class_name=None is not supported"),
    ],
)
def test_broken_indexes(changes, message, folder, edit_json):
    edit_json(folder / "model_index.json", **changes)
    with pytest.raises(LoadError, match=message):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)


def test_a_missing_entry_in_the_index(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"model_index\.json: doesn't name vae, which StableDiffusionPipeline needs"):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)


@pytest.mark.parametrize("file", ["../../x.safetensors", "/etc/passwd", "sub/x.safetensors", "missing.safetensors"])
def test_shards_stay_in_their_folder(file, folder):
    relayout(folder / UNET, "shards")
    index_file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["conv_in.bias"] = file
    index_file.write_text(json.dumps(index))
    with pytest.raises(LoadError, match=re.escape(file)):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)


class Malice:
    def __reduce__(self):
        return (os.system, ("touch malice-was-here",))


def test_code_in_a_pickle_does_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / UNET).unlink()
    torch.save({"conv_in.bias": Malice()}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(LoadError, match=r"diffusion_pytorch_model\.bin: can't be read as a file of weights alone"):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    assert not (tmp_path / "malice-was-here").exists()


def test_an_unknown_key_names_file_key_and_value(folder, edit_json):
    edit_json(folder / "unet/config.json", timestep_post_act="silu")
    with pytest.raises(ConfigError, match=r"unet/config\.json: timestep_post_act='silu' is not supported.*null"):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
    edit_json(folder / "unet/config.json", timestep_post_act=None, surprise=[1])
    with pytest.raises(ConfigError, match=r"unet/config\.json: unknown key surprise=\[1\]"):
        DiffusionPipeline.from_pretrained(folder, **NO_CHECKER)
