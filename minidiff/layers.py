"""torch's linear layers, convolutions and attention, and two ways past them where a picture is drawn on a CPU.

Half precision, where the CPU has no products of it, goes by way of float32: torch imitates them, a hundred times as
slowly.

And `layers.QUICK = True` takes oneDNN for the products of float32. torch takes MKL, which uses half of a vector of 512
bits on a CPU that isn't Intel's: one core of a Zen 5 reaches 105 GFLOP/s by it, 245 by oneDNN, and attention takes 0.7
of the time in such products, a few hundred queries at a time. On a Zen 3, whose vectors have 256 bits, the first gains
little, and the second takes 1.7 of the time. Sums run in another order: a pass differs by 1e-6 of its largest number, a
run of many steps by up to 1e-4, and so it is off until asked for.
"""

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
QUICK = False
LARGE = 2**14  # numbers in an input, from which on the call of oneDNN, 12 microseconds, is repaid
QUERIES = 512  # that look at all keys at once: their weights stay in the cache
KEYS = 128  # from which on attention in parts is quicker

# What the CPU has no products of
SLOW = {
    dtype
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported"))
    if ONEDNN and not getattr(torch.ops.mkldnn, name, lambda: True)()
}


def drawing(dtypes: Iterable[torch.dtype], *tensors: Tensor | None, least: int = 0) -> bool:
    """Whether only the values of what is computed from `tensors` are asked for: they are of one of `dtypes`, on the
    CPU, torch's own kind (not quantised, fake or batched), and nobody wants gradients or follows the operations. The
    first one must have `least` numbers."""
    followed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (followed or tensors[0].numel() < least or torch.is_autocast_enabled("cpu")) and all(
        type(x) in (Tensor, nn.Parameter)
        and x.dtype in dtypes
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad.unpack_dual(x).tangent is None
        for x in tensors
        if x is not None
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., n) and (m, n) -> (..., m)."""
    if QUICK and ONEDNN and drawing((torch.float32,), x, weight, bias, least=LARGE):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def through_float32(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`layer(x, weight, bias)`, in float32 where this CPU can't multiply numbers of x's dtype."""
    if x.dtype in SLOW and drawing((x.dtype,), x, weight, bias):
        return layer(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return layer(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return through_float32(product, x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return through_float32(self._conv_forward, x, self.weight, self.bias)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head. q is (B, L, C), k and v are (B, S, C); returns (B, L, C).

    `mask`, which must broadcast to (B, heads, L, S), is true where a query may look.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, C / heads)
    quick = mask is None and in_parts_is_quicker(q, k, v)
    y = in_parts(q, k, v) if quick else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(2)


def in_parts_is_quicker(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return QUICK and ONEDNN and k.shape[-2] >= KEYS and drawing((torch.float32, torch.bfloat16), q, k, v)


def in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head after the other, and of some QUERIES after the others; in float32, whatever the dtype."""
    out = torch.empty_like(q)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        keys, values = k[b, h].float() * q.shape[-1] ** -0.5, v[b, h].T.float().contiguous()  # (S, d), (d, S)
        for rows, into in zip(q[b, h].float().split(QUERIES), out[b, h].split(QUERIES), strict=True):
            into.copy_(product(product(rows, keys).softmax(-1), values))
    return out
