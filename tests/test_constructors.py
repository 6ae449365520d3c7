"""What the reference's constructors take, key by key: each is known here at its default, and what it saves loads."""

import inspect
import json
import os

import diffusers
import pytest
import torch
import transformers
from reference import randomize

import minidiff as m
from minidiff.loading.component import REGISTRY, Configured
from minidiff.loading.model import Model
from weights_compat import TABLES


def reference_class(name):
    """The reference's class of that name, or None."""
    return getattr(diffusers, name, None) if hasattr(diffusers, name) else getattr(transformers, name, None)


def defaults(name):
    """The keys of the reference's constructor that have a default."""
    cls = reference_class(name)
    config = getattr(cls, "config_class", None) or cls  # transformers' models have theirs in a class of its own
    parameters = inspect.signature(config.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.VAR_KEYWORD}


NAMES = sorted(name for name, cls in REGISTRY.items() if issubclass(cls, Configured) and reference_class(name))
KEYS = [(name, key) for name in NAMES for key in defaults(name)]

# Where a default object is huge, or can't be made: the same, narrow
NARROW = {
    "UNet2DConditionModel": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 16},
    "UNet2DModel": {"block_out_channels": (32, 32, 32, 32), "sample_size": 8},
    "CLIPTextModel": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 100},
}
NARROW["CLIPTextModelWithProjection"] = NARROW["CLIPTextModel"]


def test_every_model_and_sampler_is_walked():
    public = [*m.models.__all__, *m.schedulers.__all__]
    configured = {name for name in public if issubclass(getattr(m, name), Configured)}
    elsewhere = {"StableDiffusionSafetyChecker", "LDMBertModel"}  # the reference's lie in their pipelines' folders
    assert configured - elsewhere <= set(NAMES)
    assert {name for name in NAMES if issubclass(REGISTRY[name], Model)} >= {"AutoencoderKL", "UNet2DModel"}


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_each_key_is_known_at_the_references_default(name, key):
    cls, value = REGISTRY[name], defaults(name)[key]
    config = cls.Config.read({key: value})
    if key in config:
        known = config[key]
        assert (list(known) == list(value)) if isinstance(value, list | tuple) else known == value
    own = inspect.signature(cls.Config).parameters.get(key)
    if own is not None:
        assert own.default == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_saves_loads(name, tmp_path):
    cls, reference = REGISTRY[name], reference_class(name)
    kwargs = NARROW.get(name, {})
    config_class = getattr(reference, "config_class", None)
    theirs = reference(config_class(**kwargs)) if config_class else reference(**kwargs)
    if isinstance(theirs, torch.nn.Module):
        randomize(theirs, 0)
    theirs.save_pretrained(tmp_path)
    ours = cls.from_pretrained(tmp_path)
    for key, value in kwargs.items():
        assert ours.config[key] == value
    if isinstance(theirs, torch.nn.Module):
        table = TABLES[name]
        expected = {table.ours(key): tensor for key, tensor in theirs.state_dict().items() if table.ours(key)}
        assert expected.keys() == ours.state_dict().keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())
        return
    saved = json.loads((tmp_path / cls.files[0]).read_text())
    for key in inspect.signature(cls.Config).parameters:
        if key in saved:
            value = saved[key]
            assert ours.config[key] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL"])
def test_averaged_copies_of_training_scripts_load(name, tmp_path):
    """`EMAModel.save_pretrained` writes its own numbers into the model's config."""
    from diffusers.training_utils import EMAModel

    kwargs = NARROW.get(name, {})
    model = reference_class(name)(**kwargs)
    EMAModel(model.parameters(), model_cls=type(model), model_config=model.config).save_pretrained(tmp_path)
    assert "inv_gamma" in json.loads((tmp_path / "config.json").read_text())
    assert REGISTRY[name].from_pretrained(tmp_path).config["decay"] == 0.9999
    assert os.listdir(tmp_path)
