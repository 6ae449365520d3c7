"""What holds for any model of any legal config: samples don't see each other, training reaches every parameter, ..."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CONFIGS, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minidiff as m

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # in float64

names = pytest.mark.parametrize("name", CONFIGS)


def build(name, config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(m, name)(**config).double()


def chosen(arguments, rows):
    if isinstance(arguments, dict):
        return {key: chosen(value, rows) for key, value in arguments.items()}
    return arguments[rows]


def tensors(output):
    return [leaf for leaf in tree_leaves(tuple(output)) if isinstance(leaf, torch.Tensor)]


@names
@given(st.data())
@settings(max_examples=6)
@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other(name, data):
    """Three at once are three alone, in any order; twice the same gives the same bits; so does channels_last nearly."""
    model = build(name, data.draw(CONFIGS[name]))
    arguments = inputs(data, model, 3)
    together = tensors(model(**arguments))
    for i in range(3):
        for got, want in zip(tensors(model(**chosen(arguments, [i]))), together, strict=True):
            torch.testing.assert_close(got, want[[i]], **CLOSE)
    for again, want in zip(tensors(model(**arguments)), together, strict=True):
        assert torch.equal(again, want)
    model.to(memory_format=torch.channels_last)
    if "sample" in arguments:
        arguments["sample"] = arguments["sample"].to(memory_format=torch.channels_last)
    for got, want in zip(tensors(model(**arguments)), together, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@names
@given(st.data())
@settings(max_examples=6)
def test_training_reaches_every_parameter(name, data):
    model = build(name, data.draw(CONFIGS[name])).train()
    outputs = tensors(model(**inputs(data, model, 2)))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        # One number added to all keys changes no softmax, and attention over a single pixel or token has none to move
        if ".q." not in parameter and ".k." not in parameter and not unread(model, parameter):
            assert value.grad.abs().max() > 0, parameter


def unread(model, parameter):
    """Norms before the queries of an attention over one token alone have nothing to say either."""
    return parameter.endswith("self_norm.weight") or parameter.endswith("cross_norm.weight")


class OnlyMeta(TorchDispatchMode):
    """Fails as soon as anything is computed on a device that isn't meta."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            assert not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta", f"{function} on {leaf.device}"
        return out


@names
@given(st.data())
@settings(max_examples=10)
@torch.no_grad()
def test_shapes_are_right_for_any_legal_size(name, data):
    """On the meta device, which has shapes alone; no other device is touched."""
    config = data.draw(CONFIGS[name])
    with torch.device("meta"):
        model = getattr(m, name)(**config).double()
    arguments = inputs(data, model, 2, "meta")
    with OnlyMeta():
        output = model(**arguments)
    if name.startswith("CLIP"):
        B, L = arguments["input_ids"].shape
        assert output.last_hidden_state.shape == (B, L, config["hidden_size"])
        projected = name == "CLIPTextModelWithProjection"
        pooled, width = ("text_embeds", "projection_dim") if projected else ("pooler_output", "hidden_size")
        assert getattr(output, pooled).shape == (B, config[width])
        return
    B, _, H, W = arguments["sample"].shape
    if name != "AutoencoderKL":
        assert output.sample.shape == (B, config["out_channels"], H, W)
        return
    h, w = H // model.factor, W // model.factor
    assert output.sample.shape == (B, config["out_channels"], h * model.factor, w * model.factor)
    with OnlyMeta():
        assert model.encode(arguments["sample"]).latent_dist.mean.shape == (B, config["latent_channels"], h, w)


@given(st.data())
def test_the_encoders_distribution_is_a_gaussian(data):
    """`sample`, `mode` and `kl` of the VAE's latents, beside torch's own Gaussian."""
    model = build("AutoencoderKL", data.draw(CONFIGS["AutoencoderKL"]))
    with torch.no_grad():
        posterior = model.encode(inputs(data, model, 2)["sample"]).latent_dist
    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    standard = torch.distributions.Normal(torch.zeros_like(posterior.mean), 1.0)
    kl = torch.distributions.kl_divergence(gaussian, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), kl, **CLOSE)
    torch.testing.assert_close(posterior.mode(), gaussian.mode, **CLOSE)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, gaussian.mean + gaussian.stddev * noise, **CLOSE)
