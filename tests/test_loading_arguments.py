"""The keywords of `from_pretrained` and `save_pretrained`: each does what the reference's does, means nothing here, or
is refused with the reason. Shards, and the dtype of the files. Folders that the reference saves today."""

import inspect
import json
import re
import shutil
import warnings

import diffusers
import pytest
import torch
import transformers
from fake_hub import REPOSITORY
from safetensors import safe_open
from safetensors.torch import load_file
from test_loading import hub as hub  # fixtures
from test_loading import sd_folder as sd_folder

import minidiff as m
from minidiff import LoadError
from minidiff.loading import tensors
from minidiff.loading.arguments import DOWNLOADS, LOADING, SAVING, one_device
from weights_compat import TABLES

COMPONENTS = (m.UNet2DConditionModel, m.PNDMScheduler, m.CLIPTokenizer, m.CLIPTextModel)


def load(cls, folder, **keywords):
    subfolder = {m.UNet2DConditionModel: "unet", m.PNDMScheduler: "scheduler", m.CLIPTokenizer: "tokenizer"}
    part = {} if issubclass(cls, m.DiffusionPipeline) else {"subfolder": subfolder.get(cls, "text_encoder")}
    return cls.from_pretrained(folder, **part, **keywords)


EVERY = (*COMPONENTS, m.DiffusionPipeline, m.StableDiffusionPipeline)


@pytest.mark.parametrize("cls", EVERY)
def test_keywords_that_mean_nothing_are_taken(cls, tiny_sd_folder):
    nothing = {
        **{"low_cpu_mem_usage": False, "resume_download": True, "device_map": None, "use_auth_token": None},
        **{"force_download": False, "proxies": None, "custom_pipeline": None, "mirror": None, "max_memory": None},
        **{"trust_remote_code": False, "local_files_only": None, "revision": "main", "token": None, "dtype": None},
    }
    load(cls, tiny_sd_folder, **nothing)


@pytest.mark.parametrize("keyword", [name for name, (harmless, _) in LOADING.items() if isinstance(harmless, tuple)])
@pytest.mark.parametrize("cls", EVERY)
def test_keywords_that_would_mean_something_are_refused_with_the_reason(cls, keyword, tiny_sd_folder):
    reason = LOADING[keyword][1]
    with pytest.raises(ValueError, match=f"{keyword}='given' is not supported: ") as caught:
        load(cls, tiny_sd_folder, **{keyword: "given"})
    assert str(caught.value).endswith(reason) and len(reason) > 10


@pytest.mark.parametrize("cls", EVERY)
def test_misspelt_keywords_are_named_with_what_there_is(cls, tiny_sd_folder):
    with pytest.raises(TypeError, match=r"has no torch_dtyp; it takes .*torch_dtype.*local_files_only"):
        load(cls, tiny_sd_folder, torch_dtyp=torch.float16)


@pytest.mark.parametrize("name", ("DiffusionPipeline", "UNet2DModel", "AutoencoderKL"))
def test_every_keyword_of_the_reference_is_known(name):
    """Read from the source, where the reference takes them out of its `kwargs`."""
    taken = set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(getattr(diffusers, name).from_pretrained)))
    known = {*LOADING, *DOWNLOADS, "torch_dtype", "dtype", "variant", "use_safetensors", "device_map"}
    assert len(taken) > 15 and taken - known <= {"subfolder", "flashpack_kwargs"}
    saved = inspect.signature(getattr(diffusers, name).save_pretrained).parameters
    ours = inspect.signature(getattr(m, name).save_pretrained).parameters
    assert saved.keys() - SAVING.keys() - ours.keys() <= {"kwargs", "is_main_process"}


@pytest.mark.parametrize("keyword", ("push_to_hub", "save_function", "state_dict", "repo_id", "token"))
def test_saving_keywords(keyword, tiny_ddpm_folder, tmp_path):
    pipe = m.DDPMPipeline.from_pretrained(tiny_ddpm_folder)
    for part in (pipe, pipe.unet, pipe.scheduler):
        part.save_pretrained(tmp_path / "saved", **{keyword: None})
        with pytest.raises(ValueError, match=f"{keyword}='given' is not supported: "):
            part.save_pretrained(tmp_path / "other", **{keyword: "given"})
        with pytest.raises(TypeError, match=r"has no save_directry; it takes save_directory, variant"):
            part.save_pretrained(tmp_path / "other", save_directry="x")
    pipe.unet.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_config_keys_take_the_place_of_the_files(tiny_sd_folder):
    scheduler = m.PNDMScheduler.from_pretrained(tiny_sd_folder, subfolder="scheduler", beta_end=0.5)
    assert (scheduler.config.beta_end, scheduler.config.steps_offset) == (0.5, 1)
    unet = m.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet", sample_size=16)
    assert unet.config.sample_size == 16
    with pytest.raises(m.ConfigError, match=r"unet/config\.json: sample_size='x' is not supported"):
        m.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet", sample_size="x")
    with pytest.raises(m.LoadError, match=r"conv_in\.weight has shape .* config\.json makes it"):
        m.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet", in_channels=9)


# Devices


@pytest.mark.parametrize("device_map", ("cpu", "auto", "balanced", {"": "cpu"}, torch.device("cpu")))
def test_device_maps_of_one_device(device_map, tiny_sd_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for cls in EVERY:
        found = load(cls, tiny_sd_folder, device_map=device_map)
        assert getattr(found, "device", torch.device("cpu")).type == "cpu"


def test_device_maps_go_there(tiny_sd_folder):
    assert load(m.UNet2DConditionModel, tiny_sd_folder, device_map="meta").device.type == "meta"
    assert load(m.DiffusionPipeline, tiny_sd_folder, device_map="meta").vae.device.type == "meta"


def test_device_maps_by_what_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [one_device(name) for name in ("balanced", "cuda", "cuda:0", None)] == [
        *(torch.device("cuda"), torch.device("cuda"), torch.device("cuda:0"), None)
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match='"cuda:0"'):
        one_device("auto")
    assert one_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("device_map", ("cuda:99", "gpu", {"unet": "cpu"}, {"": 0, "vae": 1}, 3.5))
@pytest.mark.parametrize("cls", EVERY)
def test_other_device_maps_are_refused(cls, device_map, tiny_sd_folder):
    with pytest.raises(ValueError, match="device_map="):
        load(cls, tiny_sd_folder, device_map=device_map)


# The dtype of the files


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_the_files_own_dtype(dtype, tiny_sd_folder, tmp_path):
    pipe = m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.unet.to(dtype)
    pipe.save_pretrained(tmp_path / "sd")
    for name in ("torch_dtype", "dtype"):
        again = m.DiffusionPipeline.from_pretrained(tmp_path / "sd", **{name: "auto"})
        assert (again.unet.dtype, again.vae.dtype) == (dtype, torch.float32)
        assert m.UNet2DConditionModel.from_pretrained(tmp_path / "sd/unet", **{name: "auto"}).dtype == dtype
    assert m.DiffusionPipeline.from_pretrained(tmp_path / "sd").unet.dtype == torch.float32
    with pytest.raises(TypeError, match='"auto" or None, not '):
        m.DiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype="float16")


# Downloads


def test_force_download_downloads_again(hub, tmp_path):
    cache = {"cache_dir": tmp_path / "cache", "subfolder": "vae"}
    m.AutoencoderKL.from_pretrained(REPOSITORY, **cache)
    for force in (False, True):
        hub.downloaded.clear()
        m.AutoencoderKL.from_pretrained(REPOSITORY, **cache, force_download=force)
        read = {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
        assert hub.downloaded == (read if force else set())
    with pytest.raises(m.LoadError, match=r"force_download=True, but .* local_files_only"):
        m.AutoencoderKL.from_pretrained(REPOSITORY, **cache, force_download=True, local_files_only=True)
    hub.__exit__()  # the network goes away: the cache isn't what was asked for
    with pytest.raises(m.LoadError, match="not to be had from the Hub"):
        m.AutoencoderKL.from_pretrained(REPOSITORY, **cache, force_download=True)


@pytest.mark.parametrize("cls", EVERY)
def test_an_empty_path_is_not_the_working_directory(cls, tiny_sd_folder, monkeypatch):
    monkeypatch.chdir(tiny_sd_folder)
    with pytest.raises(m.LoadError, match="pretrained_model_name_or_path is empty: give a folder or a Hub id"):
        cls.from_pretrained("")
    pipe = m.DiffusionPipeline.from_pretrained(".")
    with pytest.raises(m.LoadError, match="save_directory is empty"):
        pipe.save_pretrained("")


# Shards


@pytest.mark.parametrize("variant", (None, "fp16"))
@pytest.mark.parametrize("size", (20_000, "20KB"))
def test_shards_are_those_of_the_reference(size, variant, tiny_sd_folder, tmp_path):
    pipe = m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.save_pretrained(tmp_path / "ours", max_shard_size=size, variant=variant)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", variant=variant)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size, variant=variant)
    for name in ("unet", "vae", "text_encoder"):
        folders = [tmp_path / side / name for side in ("ours", "theirs")]
        mine, reference = ({file.name for file in folder.iterdir()} for folder in folders)
        if name == "text_encoder":  # transformers packs its shards by its own rule
            assert any("-00001-of-" in file for file in mine)
            continue
        assert mine == reference and len(mine) > 3
        for file in mine:
            if ".index." in file:
                ours, other = (json.loads((folder / file).read_text()) for folder in folders)
                assert ours["weight_map"].keys() == other["weight_map"].keys()
                assert ours["metadata"]["total_size"] == other["metadata"]["total_size"]
    for side in ("ours", "theirs"):
        again = m.DiffusionPipeline.from_pretrained(tmp_path / side, variant=variant)
        for name in ("unet", "vae", "text_encoder"):
            for key, tensor in getattr(pipe, name).state_dict().items():
                assert torch.equal(getattr(again, name).state_dict()[key], tensor)
    assert max(file.stat().st_size for file in (tmp_path / "ours/unet").iterdir()) < 30_000


@pytest.mark.parametrize("size", ["20KB", "10GB"])
def test_files_that_are_converted_are_read_in_pieces(size, tiny_sd_folder, tmp_path, monkeypatch):
    """A piece may end after any tensor; one that stays as it is doesn't count."""
    unet = m.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size=size)
    opened = []
    monkeypatch.setattr(tensors, "safe_open", lambda *a, **k: opened.append(1) or safe_open(*a, **k))
    for piece in (1, 1000, 10_000, 2**28):
        monkeypatch.setattr(tensors, "PIECE", piece)
        opened.clear()
        half = m.UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16)
        shards, weights = len(list((tmp_path / "unet").glob("*.safetensors"))), unet.state_dict()
        assert len(opened) == (len(weights) if piece == 1 else shards) or 1 < piece < 2**28
        assert all(torch.equal(half.state_dict()[name], w.bfloat16()) for name, w in weights.items())
        opened.clear()
        m.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert len(opened) == shards


def test_a_file_that_is_replaced_between_two_pieces(tiny_sd_folder, tmp_path, monkeypatch):
    folder = tmp_path / "unet"
    shutil.copytree(tiny_sd_folder / "unet", folder)
    monkeypatch.setattr(tensors, "PIECE", 1)

    def replaced_after(*arguments, **keywords):
        file = safe_open(*arguments, **keywords)
        shutil.copy(arguments[0], tmp_path / "new")
        (tmp_path / "new").replace(arguments[0])
        return file

    monkeypatch.setattr(tensors, "safe_open", replaced_after)
    with pytest.raises(LoadError, match="was replaced while it was read: load again"):
        m.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


def test_shards_and_whole_files_and_variants_end_each_other(tiny_sd_folder, tmp_path):
    """What a save leaves is what it wrote, and the other variant's."""
    unet = m.UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet")
    whole = {"config.json", "diffusion_pytorch_model.safetensors"}

    def files():
        return {file.name for file in (tmp_path / "unet").iterdir()}

    unet.save_pretrained(tmp_path / "unet", max_shard_size=20_000)
    many = files()
    unet.save_pretrained(tmp_path / "unet", max_shard_size=40_000)
    assert len(files()) < len(many) and "diffusion_pytorch_model.safetensors.index.json" in files()
    unet.save_pretrained(tmp_path / "unet")
    assert files() == whole
    unet.half().save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=20_000)
    assert whole < files()
    unet.save_pretrained(tmp_path / "unet", variant="fp16")
    assert files() == {*whole, "diffusion_pytorch_model.fp16.safetensors"}
    unet.float().save_pretrained(tmp_path / "unet", max_shard_size=20_000)
    assert files() == many | {"diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.parametrize("size", (0, -1, "5 gigabytes", 1.5, None, True, "GB"))
def test_wrong_sizes_of_shards(size, tiny_models, tmp_path):
    with pytest.raises(ValueError, match='max_shard_size must be a number of bytes or a text such as "5GB"'):
        tiny_models["UNet2DModel"].save_pretrained(tmp_path / "unet", max_shard_size=size)


# Names


@pytest.mark.parametrize("name", ("AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel", "UNet2DModel"))
def test_state_dicts_with_the_hubs_names(name, tiny_models):
    model, table = tiny_models[name], TABLES[name]
    theirs = {table.hub(ours): tensor.clone() for ours, tensor in model.state_dict().items()}
    other = type(model).from_config(model.config)
    assert not other.load_state_dict(theirs).missing_keys
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert other.load_state_dict(model.state_dict()).unexpected_keys == []
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stranger\.weight"):
        other.load_state_dict({**theirs, "stranger.weight": torch.zeros(1)})
    hub, ours = next((table.hub(key), key) for key in model.state_dict() if table.hub(key) != key)
    with pytest.raises(ValueError, match=f"{ours} twice, under our name and as"):
        other.load_state_dict({ours: theirs[hub], hub: theirs[hub]})


# What the reference saves today


def test_folders_that_the_reference_saves_today(tiny_sd_folder, tiny_ddpm_folder, edit_json, tmp_path):
    for source in (tiny_sd_folder, tiny_ddpm_folder):
        reference = diffusers.DiffusionPipeline.from_pretrained(source)
        folder = tmp_path / source.name
        reference.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = m.DiffusionPipeline.from_pretrained(folder)
        edit_json(folder / "model_index.json", a_part_of_tomorrow=[None, None])
        m.DiffusionPipeline.from_pretrained(folder)
        for name, part in m.DiffusionPipeline.from_pretrained(source).components.items():
            if isinstance(part, torch.nn.Module):
                again = getattr(pipe, name).state_dict()
                assert all(torch.equal(again[key], tensor) for key, tensor in part.state_dict().items())
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ("UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"))
def test_configs_that_the_reference_writes_for_default_objects(name, tmp_path):
    with torch.device("meta"):
        reference = getattr(diffusers, name)()
    reference.save_config(tmp_path)
    cls = getattr(m, name)
    cls.Config.read(json.loads((tmp_path / "config.json").read_text()), "config.json")


def test_text_encoders_that_transformers_writes(tmp_path):
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(**size)
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    model = m.CLIPTextModel.from_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict())
