"""The name tables: one to one, and onto the reference's own names, for every manifest and for generated models."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import CONFIGS, inputs

import minidiff as m
import weights_compat
from minidiff.loading.tensors import to_ours, write_tensors
from minidiff.loading.weights import Files, read_weights, write_weights
from weights_compat import TABLES
from weights_compat.rules import Table, bare

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
    hub, ours, _, ends = draw(st.sampled_from(table.rows))
    numbers = [draw(st.integers(0, 10**6)) for _ in range(hub.count("{}"))]
    end = draw(st.sampled_from(ends))
    return f"{hub.format(*numbers)}{end}", f"{ours.format(*numbers)}{end}"


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
    hubs, ours = [row.hub for row in table.rows], [row.ours for row in table.rows]
    assert len(set(hubs)) == len(set(ours)) == len(table.rows)
    assert all(row.hub.count("{}") == row.ours.count("{}") for row in table.rows)
    assert not set(hubs) & {row.hub for row in table.aliases}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_digit_more_is_another_module(name):
    """norm10 is not norm1, though it begins so."""
    table = TABLES[name]
    for hub, ours, *_ in table.rows:
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


# The third column

CHANGED = Table(
    [
        ("conv_in", "first"),
        ("blocks.{}.proj_in", "blocks.{}.proj", "convolution"),
        ("projection", "head", "transpose"),
        *(
            bare(f"blocks.{{}}.attn.in_proj_{end}", f"blocks.{{}}.attention.{name}.{end}", f"third {number}")
            for end in ("weight", "bias")
            for number, name in enumerate("qkv")
        ),
        bare("class_embedding", "class_embedding"),
        bare("text_projection", "text_projection.weight", "transpose"),
    ]
)


def changed_files(blocks, width, inner):
    """A file's tensors, of every change: name -> shape there."""
    shapes = {"conv_in.weight": (width, 4, 3, 3), "projection.weight": (width, inner), "projection.bias": (width,)}
    shapes |= {"class_embedding": (inner,), "text_projection": (inner, width)}
    for block in range(blocks):
        shapes |= {f"blocks.{block}.proj_in.weight": (inner, width, 1, 1), f"blocks.{block}.proj_in.bias": (inner,)}
        attention = f"blocks.{block}.attn.in_proj"
        shapes |= {f"{attention}_weight": (3 * inner, width), f"{attention}_bias": (3 * inner,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.sampled_from(("10GB", 100)))
@settings(max_examples=10)
def test_changed_tensors_go_there_and_back(tmp_path_factory, blocks, width, inner, size):
    """From a file, as ours, to a file and back again: the same tensors; and each of ours is what it should be."""
    folder, there = tmp_path_factory.mktemp("changed"), changed_files(blocks, width, inner)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", there)
    ours = {name: to_ours(change, there[hub]) for hub in there for name, change in CHANGED.places(hub)}
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert len(ours) == len(there) + 4 * blocks and shapes["blocks.0.proj.weight"] == (inner, width)
    whole, last = there[f"blocks.{blocks - 1}.attn.in_proj_weight"], f"blocks.{blocks - 1}.attention"
    parts = [ours[f"{last}.{name}.weight"] for name in "qkv"]
    assert [part.shape for part in parts] == [(inner, width)] * 3 and torch.equal(torch.cat(parts), whole)
    assert torch.equal(ours["text_projection.weight"], there["text_projection"].T)
    assert all(CHANGED.origin(name) == (hub, change) for hub in there for name, change in CHANGED.places(hub))
    (folder / "again").mkdir()
    write_weights(ours, "diffusion_pytorch_model", folder / "again", Files(max_shard_size=size), CHANGED)
    for place in (folder, folder / "again"):
        read = read_weights(place, Files(), CHANGED, shapes, "it")
        assert read.keys() == ours.keys() and all(torch.equal(read[name], ours[name]) for name in ours)
    written = [load_file(file) for file in (folder / "again").glob("*.safetensors")]
    again = {name: tensor for tensors in written for name, tensor in tensors.items()}
    assert again.keys() == there.keys() and all(torch.equal(again[name], there[name]) for name in there)


@pytest.mark.parametrize("name", ("class_embedding.weight", "blocks.0.attn.in_proj_weight.bias", "conv_in"))
def test_bare_names_are_whole_names(name):
    assert CHANGED.ours(name) is None


def test_an_unknown_change_is_an_error():
    with pytest.raises(ValueError, match="change='turned' is not known"):
        to_ours("turned", torch.zeros(1))
