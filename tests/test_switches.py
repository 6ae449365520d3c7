"""What networks have besides weights: tiles, slices, checkpointing, counting; compiled, exported and wrapped ones."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from reference import CIFAR, difference, narrow_config, twins
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import minidiff as m

MODELS = ("AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel", "UNet2DModel")
each_model = pytest.mark.parametrize("name", MODELS)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(model, batch=2):
    """Legal inputs of a tiny model, the batch first, each a tensor."""
    if isinstance(model, m.CLIPTextModel):
        ids = torch.arange(batch * 7).reshape(batch, 7)
        ids[:, -1] = model.config.eos_token_id
        return {"input_ids": ids}
    inputs = {"sample": noise(batch, model.config.in_channels, 8, 8)}
    if not isinstance(model, m.AutoencoderKL):
        inputs["timestep"] = torch.arange(batch) + 500
    if isinstance(model, m.UNet2DConditionModel):
        inputs["encoder_hidden_states"] = noise(batch, 5, model.config.cross_attention_dim)
    return inputs


# The VAE in parts


def vaes(**changes):
    return twins("AutoencoderKL", narrow_config("stable-diffusion-v1-5", "vae")[1] | {"sample_size": 32} | changes)


SIZES = [(4, 4), (5, 4), (9, 13), (16, 3), (2, 30), (7, 7)]  # in latents; a tile is 4 x 4 of them, or 32 x 32 pixels


@torch.no_grad()
def test_tiles_are_the_references():
    """Equal bits, at sizes with whole, partial and tiny tiles at the far edges."""
    reference, ours = vaes()
    for vae in (reference, ours):
        vae.enable_tiling()
    for key in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor", "use_tiling"):
        assert getattr(ours, key) == getattr(reference, key)
    for h, w in SIZES:
        latents, picture = noise(2, 4, h, w), noise(2, 3, 8 * h, 8 * w)
        assert torch.equal(ours.decode(latents).sample, reference.decode(latents).sample)
        mine, theirs = ours.encode(picture).latent_dist, reference.encode(picture).latent_dist
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.logvar, theirs.logvar)
        assert torch.equal(ours(picture).sample, reference(picture).sample)
    latents = noise(1, 4, 9, 9)
    tiled = ours.decode(latents).sample
    ours.disable_tiling()
    assert difference(tiled, ours.decode(latents).sample) > 1e-3  # each tile sees itself alone


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_tiles_of_other_sizes_and_in_half_precision(overlap):
    reference, ours = vaes(sample_size=64)
    for vae in (reference, ours):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 32, 4, overlap
    latents = noise(1, 4, 9, 6)
    assert torch.equal(ours.decode(latents).sample, reference.decode(latents).sample)
    expected = reference.decode(latents).sample
    # Measured: 0.8 % of the largest value, as much as the reference's own tiles are off in bfloat16
    assert difference(ours.bfloat16().decode(latents.bfloat16()).sample.float(), expected) < 0.02


@torch.no_grad()
def test_tiles_that_do_not_meet_are_an_error():
    _, ours = vaes()
    ours.enable_tiling()
    for sizes in ((32, 4, 0.3), (36, 4, 0.25), (64, 4, 0.25), (24, 3, 0.25)):
        ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor = sizes
        with pytest.raises(ValueError, match="tile_sample_min_size that is 8 times tile_latent_min_size"):
            ours.decode(noise(1, 4, 9, 9))
    ours.enable_tiling(False)
    ours.decode(noise(1, 4, 9, 9))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@torch.no_grad()
def test_tiles_take_less_memory():
    """No tensor larger than a tile's or the picture. (Measured for a VAE of a quarter of SD's width, 512 x 512 pixels
    in tiles of 128: 58 MiB in place of 326.)"""
    _, vae = vaes()
    latents = noise(1, 4, 20, 20)
    sizes = {}
    for tiling in (False, True):
        vae.enable_tiling(tiling)
        with Largest() as largest:
            picture = vae.decode(latents).sample
        sizes[tiling] = largest.numel
    assert sizes[False] > 20 * picture.numel()
    assert sizes[True] == max(picture.numel(), sizes[False] // 25)  # a tile has 1/25 of the pixels


@torch.no_grad()
def test_slices_take_one_picture_after_another():
    reference, ours = vaes()
    seen = []
    ours.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for tiling in (False, True):
        latents, picture = noise(3, 4, 5, 5), noise(3, 3, 40, 40)
        for vae in (reference, ours):
            vae.enable_slicing()
            vae.use_tiling = tiling
        seen.clear()
        assert torch.equal(ours.decode(latents).sample, reference.decode(latents).sample)
        assert set(seen) == {1}
        assert torch.equal(ours.encode(picture).latent_dist.mean, reference.encode(picture).latent_dist.mean)
    ours.disable_slicing()
    ours.decode(latents)
    assert seen[-1] == 3


# Training


def gradients(model, inputs):
    model.zero_grad()
    out = model(**inputs)[0]
    (out * noise(*out.shape, seed=3)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@each_model
def test_gradient_checkpointing_computes_again_and_changes_nothing(name, tiny_models):
    model = tiny_models[name].train()
    inputs = arguments(model)
    calls = []

    def vae_blocks():
        return [*model.decoder.up, *(level.resample for level in model.decoder.up[:-1])]

    blocks = {"AutoencoderKL": vae_blocks, "CLIPTextModel": lambda: model.layers}
    for block in blocks.get(name, lambda: model.up)():
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    assert not model.is_gradient_checkpointing
    plain, once = gradients(model, inputs), len(calls)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    again, more = gradients(model, inputs), len(calls) - once
    assert more == 2 * once
    assert all(torch.equal(again[key], plain[key]) for key in plain)
    calls.clear()
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == once
    model.disable_gradient_checkpointing()
    gradients(model, inputs)
    assert len(calls) == 2 * once


@each_model
def test_num_parameters(name, tiny_models):
    model = tiny_models[name]
    total = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == total
    embeddings = sum(x.weight.numel() for x in model.modules() if isinstance(x, nn.Embedding))
    assert (embeddings > 0) == (name == "CLIPTextModel")
    assert model.num_parameters(exclude_embeddings=True) == total - embeddings
    first = next(model.parameters())
    first.requires_grad = False
    assert model.num_parameters(only_trainable=True) == total - first.numel()


def test_num_parameters_is_the_references():
    reference, ours = twins(*narrow_config("stable-diffusion-v1-5", "unet"))
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert ours.num_parameters(**options) == reference.num_parameters(**options)


def test_switches_that_have_nothing_to_do(tiny_models):
    unet = tiny_models["UNet2DConditionModel"]
    inputs = arguments(unet)
    before = unet(**inputs).sample
    unet.enable_xformers_memory_efficient_attention()
    unet.disable_xformers_memory_efficient_attention()
    unet.set_attention_slice("max")
    unet.set_default_attn_processor()
    unet.set_attn_processor(AttnProcessor2_0())
    unet.set_attn_processor({"mid_block.attentions.0.processor": AttnProcessor2_0()})
    assert torch.equal(unet(**inputs).sample, before)
    with pytest.raises(ValueError, match=r"FusedAttnProcessor2_0.*minidiff.models.unet.Attention"):
        unet.set_attn_processor(FusedAttnProcessor2_0())
    with pytest.raises(ValueError, match="attention_op must be None"):
        unet.enable_xformers_memory_efficient_attention(attention_op=max)
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.self_attention"):
        _ = unet.attn_processors


# Outputs


@each_model
def test_outputs_read_in_every_way(name, tiny_models):
    model = tiny_models[name]
    with torch.no_grad():
        out = model(**arguments(model))
    field = "last_hidden_state" if name == "CLIPTextModel" else "sample"
    value = getattr(out, field)
    assert out[0] is out[field] is value
    assert field in out.keys()  # noqa: SIM118 (not a dict)
    assert dict(out.items())[field] is value
    assert out.values()[0] is out.to_tuple()[0] is value
    first, *_ = out
    assert first is value
    with pytest.raises(KeyError, match=f"has no 'image'; it has {field}"):
        out["image"]


# Compiled, exported, wrapped


@each_model
def test_one_compilation_for_all_timesteps_and_batches_of_a_size(name, tiny_models):
    torch.compiler.reset()
    model, counter = tiny_models[name], CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for t in (999, 500, 3, 1, 0):
            inputs = arguments(model)
            if "timestep" in inputs:
                inputs["timestep"] = torch.tensor(t)
            assert torch.equal(compiled(**inputs)[0], model(**inputs)[0])
            assert type(compiled(**inputs)) is type(model(**inputs))
    assert counter.frame_count == 1


@each_model
@torch.no_grad()
def test_exports_with_any_batch(name, tiny_models):
    model = tiny_models[name]
    batch = Dim("batch", min=1, max=64)
    inputs = arguments(model, 3)
    program = export(model, (), inputs, dynamic_shapes={key: {0: batch} for key in inputs}).module()
    for n in (2, 3, 5):
        inputs = arguments(model, n)
        got, want = program(**inputs), model(**inputs)
        torch.testing.assert_close(got[0], want[0])
        assert type(got) is type(want)
    if "timestep" in inputs:  # one for all
        inputs["timestep"] = torch.tensor(7)
        shapes = {key: {0: batch} if value.ndim else None for key, value in inputs.items()}
        program = export(model, (), inputs, dynamic_shapes=shapes).module()
        inputs = {**arguments(model, 4), "timestep": torch.tensor(900)}
        torch.testing.assert_close(program(**inputs).sample, model(**inputs).sample)


@torch.no_grad()
def test_exports_each_half_of_the_vae(tiny_models):
    vae = tiny_models["AutoencoderKL"]
    batch = Dim("batch", min=1, max=64)

    class Half(nn.Module):
        def __init__(self, method):
            super().__init__()
            self.vae, self.method = vae, method

        def forward(self, x):
            out = getattr(self.vae, self.method)(x)[0]
            return out if self.method == "decode" else out.mode()

    for method, channels in (("decode", 4), ("encode", 3)):
        half = Half(method)
        program = export(half, (noise(3, channels, 8, 8),), dynamic_shapes={"x": {0: batch}}).module()
        x = noise(5, channels, 8, 8, seed=1)
        torch.testing.assert_close(program(x), half(x))


class Wrapped(nn.Module):
    """A layer with a low-rank addition, as adapters make them: of the layer it has `forward` alone."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        out = self.inner(x)
        return out + self.scale * out


@each_model
def test_every_layer_can_be_wrapped(name, tiny_models):
    model = tiny_models[name]
    inputs = arguments(model)
    before = model(**inputs)[0]
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, kinds):
                setattr(module, child, Wrapped(layer))
    assert sum(isinstance(x, Wrapped) for x in model.modules()) > 10
    after = model(**inputs)[0]
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(x.scale.grad is not None for x in model.modules() if isinstance(x, Wrapped))


@each_model
@torch.no_grad()
def test_every_block_can_be_compiled_alone(name, tiny_models):
    """As for `pipe.unet.mid = torch.compile(pipe.unet.mid)`."""
    torch.compiler.reset()
    model = tiny_models[name]
    inputs = arguments(model)
    before = model(**inputs)[0]
    for child, module in list(model.named_children()):
        if isinstance(module, nn.ModuleList):
            for i, block in enumerate(module):
                module[i] = torch.compile(block, backend="eager")
        else:
            setattr(model, child, torch.compile(module, backend="eager"))
    assert torch.equal(model(**inputs)[0], before)


# What was wrong in silence


def test_kl_in_half_precision():
    """A sum beyond 65504, float16's largest number: infinite in the reference."""
    moments = torch.cat([noise(2, 4, 64, 64) * 5, noise(2, 4, 64, 64, seed=1)], dim=1)
    kl = m.models.vae.DiagonalGaussianDistribution(moments).kl()
    for dtype in (torch.float16, torch.bfloat16):
        half = m.models.vae.DiagonalGaussianDistribution(moments.to(dtype)).kl()
        assert half.min() > 65504
        torch.testing.assert_close(half, kl, rtol=2e-3, atol=0)
    assert m.models.vae.DiagonalGaussianDistribution(moments.double()).kl().dtype == torch.float64


def test_a_picture_of_70_by_75(tiny_models):
    vae = vaes()[1]
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 70, 75\).*multiples of 8.*64 x 72.*VaeImageProcessor"):
        vae.encode(noise(1, 3, 70, 75))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae(noise(1, 3, 64, 60))


@pytest.mark.parametrize("eos_token_id", [2, 99])
def test_a_text_without_an_end(eos_token_id):
    """Its pooled state would be the start's, which has seen nothing."""
    encoder = m.CLIPTextModel(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=eos_token_id,
    )
    start, end = 98, 99
    whole = torch.tensor([[start, 5, 7, end, end], [start, 5, end, 0, 0]])
    encoder(whole)
    cut = torch.tensor([[start, 5, 7, end, end], [start, 5, 7, 8, 9]])
    with pytest.raises(ValueError, match=r"no end-of-text token.*in the texts \[1\]"):
        encoder(cut)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("class_labels", 1, "class_labels must be none, for this UNet has no classes"),
        ("cross_attention_kwargs", {}, "cross_attention_kwargs must be None: "),
        ("timestep_cond", torch.ones(1), "timestep_cond has shape .*; this UNet takes none"),
    ],
)
def test_the_references_other_arguments(argument, value, message, tiny_models):
    unet = tiny_models["UNet2DConditionModel"]
    inputs = arguments(unet)
    assert torch.equal(unet(**inputs, **{argument: None}).sample, unet(**inputs).sample)
    with pytest.raises(ValueError, match=message):
        unet(**inputs, **{argument: value})
    with pytest.raises(TypeError, match="tokens is no argument of UNet2DConditionModel"):
        unet(**inputs, tokens=None)


@torch.no_grad()
def test_our_networks_in_the_references_place():
    """A copy made by pickle or `deepcopy` is the same network, and our UNet's output serves diffusers' scheduler."""
    reference, ours = twins("UNet2DModel", CIFAR)
    sample = noise(1, 3, 32, 32)
    predicted = copy.deepcopy(ours)(sample, torch.tensor(5))["sample"]
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    expected = scheduler.step(reference(sample, 5).sample, 901, sample).prev_sample
    assert difference(scheduler.step(predicted, 901, sample).prev_sample, expected) < 5e-6
