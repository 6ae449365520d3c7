"""The quicker ways through layers and attention: the same numbers, and taken only where values alone are asked for."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff as m
from minidiff import layers, lora

MULTIPLIED = sorted(layers.MULTIPLIED, key=str)  # what this CPU has products of

pytestmark = pytest.mark.skipif(not layers.ONEDNN, reason="this build of torch is without oneDNN")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """As on a CPU with vectors of 512 bits, and whatever the size; layers have the weights of seed 0."""
    torch.manual_seed(0)
    for name, value in {"WIDE": True, "PARTS": layers.DTYPES, "CHANNELS": 1, "PRODUCTS": 1}.items():
        monkeypatch.setattr(layers, name, value)


def prepared(layer):
    layers.prepare(layer)
    return layer


class Called(TorchDispatchMode):
    """Notes what torch's operations are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})

    def by_onednn(self) -> bool:
        return any("_linear_pointwise" in name for name in self.names)


def far(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert ours.shape == exact.shape
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["plain", "transposed", "strided", "expanded", "one row"])
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_product(form, bias, dtype):
    x, weight = random(2, 130, 96, dtype=dtype), random(64, 96, dtype=dtype)
    b = random(64, dtype=dtype) if bias else None
    if form == "transposed":  # a picture's pixels as tokens
        x, weight = random(2, 96, 130, dtype=dtype).transpose(1, 2), random(96, 64, dtype=dtype).T
    elif form == "strided":
        x, weight = random(2, 130, 200, dtype=dtype)[..., 3:195:2], random(70, 100, dtype=dtype)[3:67, :96]
    elif form == "expanded":
        x = random(1, 1, 96, dtype=dtype).expand(2, 130, 96)
    elif form == "one row":
        x, weight = random(layers.LARGE, dtype=dtype), random(64, layers.LARGE, dtype=dtype)
    exact = F.linear(x.double(), weight.double(), b if b is None else b.double())
    with Called() as called:
        assert far(layers.product(x, weight, b), exact) <= (1e-6 if dtype == torch.float32 else 2**-8)
    assert called.by_onednn()


class Other(torch.Tensor):
    """Such as quantised ones are."""


def weights_of_a_subclass(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Other), requires_grad=False)
    return contextlib.nullcontext()


OTHERWISE = {
    "gradients": lambda layer: torch.enable_grad(),
    "autocast": lambda layer: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda layer: contextlib.nullcontext(layer.double()),
    "another kind of weights": weights_of_a_subclass,
    "few numbers": lambda layer: contextlib.nullcontext(),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", OTHERWISE)
def test_is_torch_s_own_where_more_than_values_is_asked_for(reason):
    layer = prepared(layers.Linear(64, 32))
    with OTHERWISE[reason](layer), Called() as called:
        x = random(1 if reason == "few numbers" else 300, 64, dtype=layer.weight.dtype)
        y = layer(x)
    assert not called.by_onednn()
    with OTHERWISE[reason](layer):
        assert (y == F.linear(x, layer.weight, layer.bias)).all()


def traced(layer, x):
    return torch.jit.trace(layer, x)(x)


def batched(layer, x):
    return torch.vmap(layer)(x.expand(2, *x.shape))[1]


def tangent(layer, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x))))
        assert torch.allclose(y.tangent, F.linear(torch.ones_like(x), layer.weight))
        return y.primal


def called_with_others(layer, x):
    return torch.func.functional_call(layer, {"weight": layer.weight, "bias": layer.bias}, x)


def exported(layer, x):
    program = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(program)
    return program.module()(x)


WAYS = [(layers.Linear, way) for way in (traced, batched, called_with_others, exported, tangent)]
WAYS += [(layers.Conv2d, way) for way in (traced, batched, called_with_others, exported)]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_torch_s_ways_to_call_a_layer(kind, way, monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)
    layer, x = (kind(8, 4), random(3, 8)) if kind is layers.Linear else (kind(8, 4, 3, padding=1), random(2, 8, 5, 5))
    layers.prepare(layer)
    assert torch.allclose(way(layer, x), type(layer).__mro__[2].forward(layer, x), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", MULTIPLIED)
def test_gated(dtype):
    """In bfloat16 it is rounded once less than by torch."""
    layer, x = layers.Linear(96, 256).to(dtype), random(2, 130, 96, dtype=dtype)
    plain = layers.gated(layer, x)
    a, gate = F.linear(x.double(), layer.weight.double(), layer.bias.double()).chunk(2, dim=-1)
    exact = a * F.gelu(gate)
    with Called() as called:
        ours = layers.gated(prepared(layer), x)
    assert called.by_onednn() and "aten::gelu" not in called.names and ours.dtype == dtype
    of_ours, of_plain = ((y - exact).square().mean().sqrt() for y in (ours, plain))
    assert of_ours <= (3 if dtype == torch.float32 else 1) * of_plain
    assert far(ours, exact) <= (1e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_gated_layers_that_are_hooked_are_called():
    layer, x = prepared(layers.Linear(96, 256)), random(2, 130, 96)
    quick, seen = layers.gated(layer, x), []
    handle = layer.register_forward_hook(lambda layer, inputs, y: seen.append(y.shape))
    assert torch.allclose(layers.gated(layer, x), quick, atol=1e-5) and seen == [(2, 130, 256)]
    handle.remove()
    handle = layer.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    assert not torch.allclose(layers.gated(layer, x), quick, atol=1e-5)
    handle.remove()
    assert torch.equal(layers.gated(layer, x), quick)
    layer.forward = lambda x: torch.ones(2, 130, 256)
    assert torch.allclose(layers.gated(layer, x), F.gelu(torch.ones(2, 130, 128)))


def test_gated_layers_have_their_adapters(tiny_models, monkeypatch):
    unet = prepared(tiny_models["UNet2DConditionModel"])
    monkeypatch.setattr(layers, "LARGE", 0)
    layer = unet.mid.attentions[0].blocks[0].ff.proj_in
    x = random(2, 5, layer.in_features)
    with torch.no_grad():
        quick = layers.gated(layer, x)
        for parameter in lora.add(unet, targets=["ff.proj_in"]):
            parameter.normal_()
        y, gate = layer(x).chunk(2, dim=-1)
        assert torch.equal(layers.gated(layer, x), y * F.gelu(gate)) and not torch.allclose(y * F.gelu(gate), quick)


@torch.no_grad()
def test_wrong_inputs_of_linear_layers_are_told_as_by_torch():
    layer = layers.Linear(64, 32)
    for x in (random(300, 65), random(300, 64).bfloat16()):
        with pytest.raises(RuntimeError) as plain:
            layer(x)
        for call in (prepared(copy.deepcopy(layer)), lambda x: layers.gated(prepared(copy.deepcopy(layer)), x)):
            with pytest.raises(RuntimeError) as quick:
                call(x)
            assert str(quick.value) == str(plain.value)


def test_is_torch_s_own_on_the_meta_device():
    layer = prepared(layers.Linear(200, 100, device="meta"))
    with torch.no_grad():
        assert layer(torch.empty(100, 200, device="meta")).shape == (100, 100)


@torch.no_grad()
@pytest.mark.parametrize(("L", "S", "heads"), [(600, 600, 2), (513, 200, 1), (64, 1030, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_parts(L, S, heads, dtype):
    """In bfloat16 its scores are rounded too; of inputs in float32, which are rounded either way, it errs twice as much
    as torch at most."""
    whole = [random(2, n, 64) for n in (L, S, S + 1)]
    whole[2] = whole[2][:, 1:]
    q, k, v = (x.to(dtype) for x in whole)
    exact = layers.attention(q.double(), k.double(), v.double(), heads, quick=True)
    with Called() as called:
        ours = layers.attention(q, k, v, heads, quick=True)
    plain = layers.attention(q, k, v, heads)
    assert not any("scaled_dot_product" in name for name in called.names) and ours.dtype == dtype
    assert far(ours, exact) <= (2e-6 if dtype == torch.float32 else 1e-2)  # SDPA: 1.5e-6, 3e-3
    assert far(ours, exact) <= (2 if dtype == torch.float32 else 4) * far(plain, exact)
    exact = layers.attention(*(x.double() for x in whole), heads)
    of_ours, of_plain = ((y - exact).square().mean().sqrt() for y in (ours, plain))
    assert of_ours <= 2 * of_plain


@torch.no_grad()
def test_attention_in_parts_is_only_for_dtypes_it_is_quicker_in(monkeypatch):
    monkeypatch.setattr(layers, "PARTS", (torch.bfloat16,))
    for dtype, whole in ((torch.float32, True), (torch.bfloat16, False)):
        with Called() as called:
            layers.attention(*[random(1, 200, 64, dtype=dtype)] * 3, heads=2, quick=True)
        assert any("scaled_dot_product" in name for name in called.names) == whole


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [layers.Linear, layers.Conv2d])
def test_half_precision_where_the_cpu_has_none(kind, dtype, monkeypatch):
    """Sums are float32's, and rounded once."""
    monkeypatch.setattr(layers, "SLOW", {dtype})
    layer, x = (
        (kind(96, 64), random(3, 96)) if kind is layers.Linear else (kind(8, 16, 3, padding=1), random(1, 8, 9, 9))
    )
    layer, x = layer.to(dtype), x.to(dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, layer.float()(x.float()).to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 9), (1, 1), (2, 5), (70, 66)])
def test_winograd_s_convolution(H, W, bias):
    """More than one part of TILES too."""
    layer, x = layers.Conv2d(48, 40, 3, padding=1, bias=bias), random(2, 48, H, W)
    plain, exact = layer(x), layer.double()(x.double())
    for form in (x, x.to(memory_format=torch.channels_last), x.expand(3, 2, 48, H, W)[1]):
        ours = prepared(layer.float())(form)
        assert layer.kernels is not None and far(ours, exact) <= 1e-6
        assert far(ours, exact) <= 3 * far(plain, exact)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "slow"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_winograd_s_convolution_in_half_precision(dtype, slow, monkeypatch):
    """In bfloat16 what is between the transforms is rounded too, where the CPU has its products: 3 to 4 times torch's
    error. In float16 it would be too large."""
    monkeypatch.setattr(layers, "SLOW", {dtype} if slow else set())
    monkeypatch.setattr(layers, "MULTIPLIED", {torch.float32, torch.bfloat16} - layers.SLOW)
    layer, x = layers.Conv2d(64, 64, 3, padding=1).to(dtype), 10_000 * random(2, 64, 16, 16)
    x = x.to(dtype)
    plain, exact = layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    ours, narrow = prepared(layer)(x), dtype == torch.bfloat16 and not slow
    assert ours.dtype == dtype and layer.kernels[2].dtype == (dtype if narrow else torch.float32)
    of_ours, of_plain = ((y - exact).square().mean() for y in (ours, plain))
    assert of_ours <= (5 if narrow else 1.1) ** 2 * of_plain


@torch.no_grad()
def test_changed_weights_are_seen():
    """Those too that come to lie where others were: fused and taken out again, and given for one call."""
    layer, x = prepared(layers.Conv2d(32, 32, 3, padding=1)), random(1, 32, 6, 6)
    base = layer.weight.data

    def right(y, weight):
        return far(y, F.conv2d(x.double(), weight.double(), layer.bias.double(), padding=1)) <= 1e-6

    assert right(layer(x), base)
    changes = {
        "in place": lambda: layer.weight.mul_(2),
        "a new one": lambda: setattr(layer, "weight", torch.nn.Parameter(random(32, 32, 3, 3))),
        "loaded": lambda: layer.load_state_dict({"weight": random(32, 32, 3, 3) - 1, "bias": random(32)}),
    }
    for scale in (1, 2, 3, 4):
        changes[f"fused {scale}"] = lambda scale=scale: setattr(layer.weight, "data", base * scale)
        changes[f"unfused {scale}"] = lambda: setattr(layer.weight, "data", base)
    for change in changes.values():
        change()
        assert right(layer(x), layer.weight)
    for scale in (1, 2, 3, 4):
        assert right(torch.func.functional_call(layer, {"weight": base * scale}, x), base * scale)
    assert far(layer.double()(x.double()), F.conv2d(x.double(), layer.weight, layer.bias, padding=1)) == 0


def test_weights_of_inference_mode_take_torch_s_way():
    """They don't tell when they change."""
    with torch.inference_mode():
        layer, x = prepared(layers.Conv2d(32, 32, 3, padding=1)), random(1, 32, 6, 6)
        before = layer(x)
        layer.weight.mul_(2), layer.bias.mul_(2)
        assert layer.kernels is None and torch.equal(layer(x), 2 * before)


@torch.no_grad()
def test_wrong_inputs_are_told_as_by_torch():
    layer = layers.Conv2d(32, 16, 3, padding=1)
    for x in (random(1, 16, 6, 6), random(1, 32, 6, 6).bfloat16(), random(1, 32, 0, 6), random(32)):
        with pytest.raises(RuntimeError) as plain:
            layer(x)
        with pytest.raises(RuntimeError) as quick:
            prepared(copy.deepcopy(layer))(x)
        assert str(quick.value) == str(plain.value)
    assert prepared(layer)(random(32, 6, 6)).shape == (16, 6, 6)


@torch.no_grad()
def test_small_convolutions_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(layers, "PRODUCTS", 32 * 32 * 64)
    layer = prepared(layers.Conv2d(32, 32, 3, padding=1))
    layer(random(1, 32, 8, 7))
    assert layer.kernels is None
    layer(random(1, 32, 8, 8))
    assert layer.kernels is not None
    monkeypatch.setattr(layers, "CHANNELS", 33)
    layers.prepare(layer)
    assert not layer.quick


@torch.no_grad()
def test_copies_of_a_prepared_layer():
    layer, x = prepared(layers.Conv2d(32, 32, 3, padding=1)), random(1, 32, 6, 6)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.kernels is None and torch.equal(other(x), y)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 1}, {"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(options):
    layer, x = layers.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1} | options), random(1, 8, 9, 9)
    y = layer(x)
    assert torch.equal(prepared(layer)(x), y) and not layer.quick


@torch.no_grad()
def test_a_network_both_ways(tiny_models, monkeypatch):
    unet = tiny_models["UNet2DConditionModel"]
    inputs = random(2, 4, 16, 16), torch.tensor(7), random(2, 77, unet.config.cross_attention_dim)
    plain = unet(*inputs).sample
    for name, value in {"LARGE": 0, "KEYS": 1, "QUERIES": 100}.items():
        monkeypatch.setattr(layers, name, value)
    with Called() as called:
        assert far(prepared(unet)(*inputs).sample, plain.double()) <= 2e-6
    assert called.by_onednn() and unet.conv_in.kernels is not None


def test_adapters_know_these_layers_and_torchs(tiny_models):
    unet = tiny_models["UNet2DConditionModel"]
    names = [name for name, _ in unet.named_parameters()]
    attention = unet.mid.attentions[0].blocks[0].self_attention
    attention.q = torch.nn.Linear(16, 16, bias=False)
    assert len(lora.add(unet)) == 2 * len(lora.adapted(unet)) and attention.q in lora.adapted(unet)
    lora.remove(unet, "default")
    assert [name for name, _ in unet.named_parameters()] == names and type(attention.q) is layers.Linear


def test_an_optimized_pipeline_draws_the_same(tiny_sd_folder):
    pipe = m.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe("a red apple", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt")

    plain = draw().images
    pipe.optimize()
    assert 0 < (draw().images - plain).abs().max() <= 1e-5
    assert all(model.conv_in.kernels is not None for model in (pipe.unet, pipe.vae.decoder))
    assert pipe.unet.state_dict().keys() == dict(pipe.unet.named_parameters()).keys()  # nothing came to the weights
    with pytest.warns(UserWarning, match="no effect on meta, but on a CPU"):
        m.DiffusionPipeline.from_pretrained(tiny_sd_folder).to("meta").optimize()
    pipe.enable_model_cpu_offload(device="meta")  # the models wait on the CPU
    with pytest.warns(UserWarning, match="no effect on meta"):
        pipe.optimize()
