"""Linear layers and attention, as torch has them, and a faster way for both where a picture is drawn on a CPU.

torch multiplies float32 matrices by MKL, which uses half the vector width of a CPU that isn't Intel's. oneDNN, which
computes torch's convolutions, uses all of it: 245 against 105 GFLOP/s on one core of a Zen 5. Attention in one kernel
(`scaled_dot_product_attention`) saves memory and stays below both: 80, where oneDNN's products, a few hundred queries
at a time, reach 110 in float32 and 155 in bfloat16. Sums run in another order: results differ by roundings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = 512  # that look at all keys at once: their weights stay in the cache
LARGE = 2**14  # numbers in an input, from which on the call of oneDNN, 12 microseconds, is repaid


def faster(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether oneDNN may compute with `x`: it has no gradients, and compilers choose for themselves."""
    drawing = x.device.type == "cpu" and x.dtype in dtypes and x.numel() >= LARGE and not torch.is_grad_enabled()
    return drawing and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., n) and (m, n) -> (..., m)."""
    if faster(x, torch.float32):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head. q is (B, L, C), k and v are (B, S, C); returns (B, L, C).

    `mask`, which must broadcast to (B, heads, L, S), is true where a query may look.
    """
    many = mask is None and k.shape[1] >= 128 and faster(q, torch.float32, torch.bfloat16)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, C / heads)
    look = in_parts if many else F.scaled_dot_product_attention
    return look(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def in_parts(q: Tensor, k: Tensor, v: Tensor, attn_mask: None) -> Tensor:
    """Attention of one head after the other, and of some QUERIES after the others."""
    B, heads, L, d = q.shape
    out = q.new_empty(B, L, heads, d).transpose(1, 2)
    for b in range(B):
        for h in range(heads):
            keys, values = k[b, h] * d**-0.5, v[b, h].T.contiguous()  # (S, d), (d, S)
            for rows, into in zip(q[b, h].split(QUERIES), out[b, h].split(QUERIES), strict=True):
                into.copy_(product(product(rows, keys).softmax(-1), values))
    return out
