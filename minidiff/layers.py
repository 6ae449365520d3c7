"""torch's linear layers, convolutions and attention, and the ways past them where a picture is drawn on a CPU.

Half precision, where the CPU has no products of it, goes by way of float32: torch imitates them, a hundred times as
slowly.

And `prepare(network)`, which is `pipe.optimize()`, takes quicker ways: large convolutions by Winograd's algorithm
(winograd.py), in 0.35 to 0.9 of the time. On CPUs with vectors of 512 bits products are oneDNN's: in float32 torch
takes MKL, which uses half of such a vector on one that isn't Intel's (a core of a Zen 5 reaches 105 GFLOP/s by it, 245
by oneDNN), and oneDNN gates a product before it writes it. And attention is made of products, a few hundred queries at
a time, in 0.5 to 0.9 of its time. Not in float32 on a Zen 4, which halves such vectors: it would take 1.2 there, and
1.7 on a Zen 3, whose vectors have 256 bits.

Sums run in another order then: a pass of Stable Diffusion 1.5 differs by a few 1e-6 of its largest number in float32.
In bfloat16 it is off by 1.8 % (root mean square), and by 1.5 % without; attention, whose scores are rounded too, errs
by 1 to 2.6 times what it did, which makes 1 to 3 % of the error of a whole network.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import winograd

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
WIDE = ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 2**14  # numbers in an input, from which on the call of oneDNN, 12 microseconds, is repaid
QUERIES = 512  # that look at all keys at once: their weights stay in the cache
KEYS = 128  # from which on attention in parts is quicker
CHANNELS, PRODUCTS = 256, 2**26  # in and out of a convolution, and of all its channels and places: from there on too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the quicker ways are for

# That attention in parts is for. A Zen 4 is known by the bfloat16 that Intel's older CPUs haven't, without the AVX-VNNI
# of the younger ones and of the Zen 5
HAS = getattr(torch.cpu, "get_capabilities", dict)()
PARTS = DTYPES[1:] if HAS.get("avx512_bf16") and not HAS.get("avx_vnni") else DTYPES

# What the CPU has no products of
SLOW = {
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if ONEDNN and not getattr(torch.ops.mkldnn, name, lambda: True)()
}
MULTIPLIED = {torch.float32, torch.bfloat16} - SLOW  # by oneDNN


def drawing(dtypes: Iterable[torch.dtype], *tensors: Tensor | None, least: int = 0) -> bool:
    """Whether only the values of what is computed from `tensors` are asked for: all are of one of `dtypes`, on the CPU,
    torch's own kind (not quantised, fake or batched), and nobody wants gradients or follows the operations. The first
    one must have `least` numbers."""
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (followed or tensors[0].numel() < least or torch.is_autocast_enabled("cpu")) and all(
        type(x) in (Tensor, nn.Parameter)
        and x.dtype in dtypes
        and x.dtype == tensors[0].dtype
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad.unpack_dual(x).tangent is None
        for x in tensors
        if x is not None
    )


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN multiplies them. Wrong inputs go torch's way, which says what is wrong."""
    return drawing(MULTIPLIED, x, weight, bias, least=LARGE) and x.shape[-1:] == weight.shape[1:]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN: (..., n) and (m, n) -> (..., m)."""
    if by_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """That of the quicker ways' products. (float16 is too narrow for what Winograd adds up.)"""
    return dtype if dtype in MULTIPLIED else torch.float32


def through_float32(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`layer(x, weight, bias)`, in float32 where this CPU can't multiply numbers of x's dtype."""
    if x.dtype in SLOW and drawing((x.dtype,), x, weight, bias):
        return layer(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return layer(x, weight, bias)


class Prepared:
    """What `prepare` makes quicker."""

    quick = False

    def prepare(self) -> None:
        self.quick = WIDE


class Linear(Prepared, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return through_float32(product if self.quick else F.linear, x, self.weight, self.bias)


def gated(layer: nn.Linear, x: Tensor) -> Tensor:
    """a gelu(b), where a and b are the halves of layer(x), which has a bias: (..., n) -> (..., m / 2). With erf."""
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if type(layer) is Linear and layer.quick and not changed and by_onednn(x, layer.weight, layer.bias):
        (W, V), (b, c) = layer.weight.chunk(2), layer.bias.chunk(2)
        gate = torch.ops.mkldnn._linear_pointwise(x, V, c, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, W, b, "mul")
    a, b = layer(x).chunk(2, dim=-1)
    return a * F.gelu(b)


class Conv2d(Prepared, nn.Conv2d):
    kernels: tuple[Any, Tensor, Tensor] | None = None  # which weight, the weight, and what winograd.py makes of it

    def forward(self, x: Tensor) -> Tensor:
        W, b = self.weight, self.bias
        if self.quick and self._large(x) and drawing(DTYPES, x, W, b):
            K = self._kernels()
            b = None if b is None else b.to(K.dtype)
            return winograd.convolve(x.to(K.dtype), K, b, product if WIDE else F.linear).to(x.dtype)
        return through_float32(self._conv_forward, x, W, b)

    def _large(self, x: Tensor) -> bool:
        """Whether the way by Winograd is quicker. Wrong inputs go torch's way, which says what is wrong."""
        W = self.weight
        fits = x.ndim == 4 and x.shape[1] == W.shape[1] and not W.is_inference()
        return fits and x.numel() * W.shape[0] >= PRODUCTS

    def prepare(self) -> None:
        shape = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        self.quick = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and min(self.weight.shape[:2]) >= CHANNELS

    def _kernels(self) -> Tensor:
        """Made anew where the weight was exchanged, or changed in place (but through `.data`). The old one is kept: its
        address can't come back as a new one's."""
        W = self.weight.detach()
        of = W.data_ptr(), W._version
        if self.kernels is None or self.kernels[0] != of:
            self.kernels = of, W, winograd.transform(W.to(computed_in(W.dtype)))
        return self.kernels[2]

    def __getstate__(self) -> dict[str, Any]:  # of a copy, or a pickle
        return {**vars(self), "kernels": None}


def prepare(network: nn.Module) -> None:
    """From now on the network takes the quicker ways, where there are such. What the convolutions keep ready for them
    takes 16/9 of the memory of their weights, and in half precision that goes by way of float32 twice as much."""
    for module in network.modules():
        if isinstance(module, Prepared):
            module.prepare()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, quick: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head. q is (B, L, C), k and v are (B, S, C); returns (B, L, C).

    `mask`, which must broadcast to (B, heads, L, S), is true where a query may look. `quick`: see `prepare`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, C / heads)
    if quick and mask is None and k.shape[-2] >= KEYS and drawing(PARTS, q, k, v):
        y = in_parts(q, k, v)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(2)


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head after the other, and of some QUERIES after the others."""
    out, dtype = torch.empty_like(q), computed_in(q.dtype)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        keys, values = k[b, h].to(dtype) * q.shape[-1] ** -0.5, v[b, h].T.to(dtype).contiguous()  # (S, d), (d, S)
        for rows, into in zip(q[b, h].to(dtype).split(QUERIES), out[b, h].split(QUERIES), strict=True):
            into.copy_(product(product(rows, keys).softmax(-1), values))
    return out
