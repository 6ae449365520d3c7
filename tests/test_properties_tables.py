"""The name tables: one to one, and onto the reference's own names, for every manifest and for generated models."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CONFIGS, inputs

import minidiff as m
import weights_compat
from weights_compat import TABLES

MANIFESTS = sorted((Path(weights_compat.__file__).parent / "manifests").glob("*.json"))

# What files from 2022 call an attention's parts
NAMES_OF_2022 = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def reference_model(name, config):
    if name.startswith("CLIP"):
        return getattr(transformers, name)(transformers.CLIPTextConfig(**config, bos_token_id=38, pad_token_id=39))
    return getattr(diffusers, name)(**config)


def reference_shapes(name, config):
    """Every tensor of the reference's model of that config: name -> shape."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in reference_model(name, config).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
def test_every_tensor_of_the_reference_has_its_place(name, data):
    """Each of the reference's names is one of our parameters, of the same shape, each is hit once, and back again."""
    config, table = data.draw(CONFIGS[name]), TABLES[name]
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in getattr(m, name)(**config).state_dict().items()}
    reference = reference_shapes(name, config)
    assert sorted(table.ours(hub) for hub in reference) == sorted(ours)
    assert all(ours[table.ours(hub)] == shape for hub, shape in reference.items())
    prefix = "text_model." if name == "CLIPTextModel" else ""  # which transformers 5 leaves out of its own files alone
    assert {table.hub(own) for own in ours} == {prefix + hub.removeprefix(prefix) for hub in reference}
    assert all(table.ours(table.hub(own)) == own for own in ours)


@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
@settings(max_examples=5)
@torch.no_grad()
def test_renamed_weights_make_the_same_network(name, data):
    """A table that swaps two tensors of one shape maps all names one to one, and gives another network."""
    config, table = data.draw(CONFIGS[name]), TABLES[name]
    reference, ours = reference_model(name, config).double().eval(), getattr(m, name)(**config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in reference.parameters():  # norms begin at 1 and 0, and many biases at 0
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ours.load_state_dict({table.ours(hub): tensor for hub, tensor in reference.state_dict().items()})
    arguments = inputs(data, ours, 2)
    for got, want in zip(ours(**arguments)[:2], tuple(reference(**arguments).values())[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests_are_mapped_one_to_one(file):
    manifest = json.loads(file.read_text(encoding="utf-8"))
    classes = {name: spec[1] for name, spec in manifest["files"]["model_index.json"].items() if isinstance(spec, list)}
    mapped = 0
    for component, shapes in manifest["tensors"].items():
        if (table := TABLES.get(classes[component])) is None:
            continue
        names = [name for name in shapes if not table.is_ignored(name)]
        assert [table.hub(table.ours(name)) for name in names] == names
        assert len({table.ours(name) for name in names}) == len(names)
        mapped += len(names)
    assert mapped > 200


@st.composite
def rows(draw, table):
    """A row of the table, its templates filled with the same numbers."""
    hub, ours = draw(st.sampled_from(table.rows))
    numbers = [draw(st.integers(0, 10**6)) for _ in range(hub.count("{}"))]
    parameter = draw(st.sampled_from(("weight", "bias")))
    return f"{hub.format(*numbers)}.{parameter}", f"{ours.format(*numbers)}.{parameter}"


@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
def test_generated_names_go_there_and_back(name, data):
    table = TABLES[name]
    (hub, ours), (hub2, ours2) = data.draw(rows(table)), data.draw(rows(table))
    assert (table.ours(hub), table.hub(ours)) == (ours, hub)
    assert (hub == hub2) == (ours == ours2)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_two_templates_meet(name):
    table = TABLES[name]
    hubs, ours = zip(*table.rows, strict=True)
    assert len(set(hubs)) == len(set(ours)) == len(table.rows)
    assert all(hub.count("{}") == own.count("{}") for hub, own in table.rows)
    assert not set(hubs) & {old for old, _ in table.aliases}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_digit_more_is_another_module(name):
    """norm10 is not norm1, though it begins so."""
    table = TABLES[name]
    for hub, ours in table.rows:
        hub, ours = hub.replace("{}", "0") + "0.weight", ours.replace("{}", "0") + "0.weight"
        assert table.ours(hub) is None or table.hub(table.ours(hub)) == hub
        assert table.hub(ours) is None or table.ours(table.hub(ours)) == ours


@pytest.mark.parametrize("name", ("AutoencoderKL", "UNet2DModel"))
@given(st.data())
def test_names_of_2022_are_read(name, data):
    table, shapes = TABLES[name], reference_shapes(name, data.draw(CONFIGS[name]))
    for hub in shapes:
        for modern, old in NAMES_OF_2022.items():
            if f".{modern}." in hub:
                assert table.ours(hub.replace(f".{modern}.", f".{old}.")) == table.ours(hub)


@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
def test_what_no_row_knows_is_nobodys(name, data):
    table = TABLES[name]
    hub, ours = data.draw(rows(table))
    at = data.draw(st.integers(0, len(hub)))
    letter = data.draw(st.sampled_from("x._ é٣{}"))
    assert table.ours(hub[:at] + letter + hub[at:]) is None
    renumbered = hub[:at] + str(data.draw(st.integers(0, 9))) + hub[at:]  # which may be another tensor's name
    assert table.ours(renumbered) is None or table.hub(table.ours(renumbered)) == renumbered
    assert table.hub(ours + letter) is None
    assert table.ours(data.draw(st.text())) is None
    assert table.ours(hub.rpartition(".")[0]) is None


def test_ignored_names_are_those_of_position_ids():
    for name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        assert TABLES[name].is_ignored("text_model.embeddings.position_ids")
        assert TABLES[name].is_ignored("embeddings.position_ids")
    assert not any(TABLES[name].is_ignored("text_model.embeddings.token_embedding.weight") for name in CONFIGS)
