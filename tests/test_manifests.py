"""Manifests against the reference that they describe, and our modules and tables against the manifests."""

import re
from math import prod

import pytest
import torch
from safetensors import safe_open

import minidiff
from weights_compat import TABLES
from weights_compat.manifests import manifest_names, narrow, read_manifest, reference_tensors, write_manifest
from weights_compat.random_folder import make_folder, make_random_folder, write_safetensors

NAMES = manifest_names()

# As published, in millions: an account that doesn't come from the code that wrote the manifests
PARAMETERS = {
    ("stable-diffusion-v1-5", "unet"): 859_520_964,
    ("stable-diffusion-v1-5", "vae"): 83_653_863,
    ("stable-diffusion-v1-5", "text_encoder"): 123_060_480,
    ("stable-diffusion-2-1", "unet"): 865_910_724,
    ("stable-diffusion-xl-base-1.0", "unet"): 2_567_463_684,
    ("stable-diffusion-xl-base-1.0", "text_encoder_2"): 694_659_840,
    ("ddpm-cifar10-32", "unet"): 35_746_307,
    ("ddpm-celebahq-256", "unet"): 113_673_219,
}

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def models(name):
    """The models of a manifest that minidiff has: component, class name, the Hub's tensors."""
    manifest = read_manifest(name)
    classes = {component: manifest.index[component][1] for component in manifest.tensors}
    return [(c, classes[c], tensors) for c, tensors in manifest.tensors.items() if classes[c] in TABLES]


def test_there_is_a_manifest_for_every_family():
    assert len(NAMES) == 17
    covered = {class_name for name in NAMES for _, class_name, _ in models(name)}
    # No manifest's own: the safety checker holds an image encoder, previews a tiny VAE, and nets lie apart
    apart = {"AutoencoderTiny", "CLIPVisionModel", "CLIPVisionModelWithProjection", "ControlNetModel"}
    assert TABLES.keys() - covered == apart


@pytest.mark.parametrize("name", NAMES)
def test_our_modules_are_the_manifests_tensor_for_tensor(name):
    for component, class_name, tensors in models(name):
        cls = getattr(minidiff, class_name)
        with torch.device("meta"):
            model = cls(cls.Config.read(read_manifest(name).config(component)))
        ours = {key: list(parameter.shape) for key, parameter in model.state_dict().items()}
        table = TABLES[class_name]
        assert {table.ours(hub): shape for hub, shape in tensors.items()} == ours
        assert {table.hub(key): shape for key, shape in ours.items()} == tensors


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_one_to_one(name):
    for _, class_name, tensors in models(name):
        table = TABLES[class_name]
        ours = [table.ours(hub) for hub in tensors]
        assert None not in ours and len(set(ours)) == len(tensors)
        assert [table.hub(key) for key in ours] == list(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_2022_and_of_transformers_5_mean_the_same(name):
    for _, class_name, tensors in models(name):
        table, old = TABLES[class_name], {}
        for hub in tensors:
            if class_name in ("AutoencoderKL", "UNet2DModel", "VQModel"):
                pattern = r"(attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\."
                old[hub] = re.sub(pattern, lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.", hub)
            elif class_name.startswith("CLIP"):
                old[hub] = hub.removeprefix("text_model.")
            elif class_name == "StableDiffusionSafetyChecker":
                old[hub] = hub.replace("vision_model.vision_model.", "vision_model.")
        assert all(table.ours(alias) == table.ours(hub) for hub, alias in old.items())
        renamed = sum(alias != hub for hub, alias in old.items())
        assert renamed or class_name in ("UNet2DConditionModel", "LDMBertModel")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_full_size_loads_with_the_manifests_classes_and_counts(name, tmp_path):
    """As it would from the Hub: all of its JSON, and files of every tensor, whose zeros take no room on the disk."""
    manifest = read_manifest(name)
    make_folder(manifest, tmp_path)
    pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe).__name__ == manifest.index["_class_name"]
    for component, spec in manifest.index.items():
        if isinstance(spec, list):
            part, renamed = getattr(pipe, component), {"CLIPFeatureExtractor": "CLIPImageProcessor"}
            assert type(part).__name__ == renamed.get(spec[1], spec[1] or "NoneType")
    for component, tensors in manifest.tensors.items():
        loaded = getattr(pipe, component).state_dict().values()
        assert (len(loaded), sum(x.numel() for x in loaded)) == (len(tensors), sum(map(prod, tensors.values())))
    sizes = [pipe.unet.config.sample_size, pipe.scheduler.config.num_train_timesteps]
    assert sizes == [manifest.config("unet")["sample_size"], len(pipe.scheduler)]


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_is_what_the_reference_has_today(name):
    manifest = read_manifest(name)
    assert reference_tensors(manifest.files) == manifest.tensors


@pytest.mark.parametrize(("name", "component"), PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name, component):
    shapes = read_manifest(name).tensors[component].values()
    assert sum(map(prod, shapes)) == PARAMETERS[name, component]


def test_a_manifest_is_found_by_its_repository_too():
    assert read_manifest("stable-diffusion-v1-5/stable-diffusion-v1-5") == read_manifest("stable-diffusion-v1-5")


@pytest.mark.parametrize("name", ["stable-diffusion-9", "someone/stable-diffusion-v1-5", "", "../pyproject"])
def test_an_unknown_manifest_is_an_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match=r"no such manifest; there are .*stable-diffusion-v1-5"):
        read_manifest(name)


@pytest.mark.parametrize("name", NAMES)
def test_narrow_keeps_every_tensor_of_every_block(name):
    """What a small folder may lack are whole layers of a text encoder or a transformer, never a kind of tensor."""

    def kinds(tensors):
        return {re.sub(r"(layers|transformer_blocks)\.\d+", r"\1.#", key) for key in tensors}

    manifest = read_manifest(name)
    small = narrow(manifest)
    for component, tensors in manifest.tensors.items():
        assert kinds(small.tensors[component]) == kinds(tensors)
    assert sum(prod(shape) for t in small.tensors.values() for shape in t.values()) < 20e6


def test_a_random_folder_holds_the_manifests_tensors_and_no_constant(tmp_path):
    small = narrow(read_manifest("stable-diffusion-v1-5"))
    make_random_folder(small, tmp_path / "a", seed=1)
    make_random_folder(small, tmp_path / "b", seed=2)
    for component, shapes in small.tensors.items():
        files = [next((tmp_path / run / component).glob("*.safetensors")) for run in "ab"]
        with safe_open(files[0], "pt") as one, safe_open(files[1], "pt") as other:
            assert {key: list(one.get_tensor(key).shape) for key in one.keys()} == shapes  # noqa: SIM118
            for key in shapes:
                tensor = one.get_tensor(key)
                assert tensor.isfinite().all() and not torch.equal(tensor, other.get_tensor(key))
                assert tensor.unique().numel() > 0.9 * min(tensor.numel(), 1000)


def test_a_random_folder_with_no_room_for_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(OSError, match=r"GB are free, but the weights need"):
        make_random_folder(read_manifest("ddpm-cifar10-32"), tmp_path)


def test_write_safetensors_writes_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b.weight": torch.randn(7), "c": torch.randn(2, 1, 4)}
    write_safetensors(tmp_path / "x", {k: list(v.shape) for k, v in tensors.items()}, lambda key, shape: tensors[key])
    with safe_open(tmp_path / "x", "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())


def test_write_manifest_reads_what_make_random_folder_wrote(tmp_path, monkeypatch):
    small = narrow(read_manifest("stable-diffusion-2-1"))
    make_random_folder(small, tmp_path / "folder")
    monkeypatch.setattr("weights_compat.manifests.FOLDER", tmp_path)
    assert write_manifest(tmp_path / "folder", "me/small") == tmp_path / "small.json"
    assert read_manifest("me/small") == small._replace(repository="me/small")
