"""LoRA (Low-rank adaptation of large language models, arXiv 2106.09685): few numbers that change what a network draws.

A layer with the weight W computes with W + (alpha / r) B A (eq. 3 and section 4.1): A is (r, in), B is (out, r), and
the rank r is small. A convolution's A is one with r channels out, and its B one of 1x1. Train some:

    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    optimizer = torch.optim.AdamW(minidiff.lora.add(pipe.unet, rank=4), lr=1e-3)
    for latents, states in pictures:
        eps, t = torch.randn_like(latents), torch.randint(1000, latents.shape[:1])
        predicted = pipe.unet(pipe.scheduler.add_noise(latents, eps, t), t, states).sample
        torch.nn.functional.mse_loss(predicted, eps).backward()
        optimizer.step(), optimizer.zero_grad()
    pipe.save_lora_weights("my-lora", pipe.unet)  # minidiff and diffusers: load_lora_weights("my-lora")
"""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import as_integer, as_names, check_number
from .layers import Conv2d, Linear


class _Call(threading.local):
    """What this thread's present call multiplies all adapters by: `cross_attention_kwargs={"scale": ...}`."""

    def __init__(self):  # in each thread; of the instance, since torch.compile would take the class's for a constant
        self.scale = 1.0


CALL = _Call()


@contextmanager
def scaled(scale: float | None) -> Iterator[None]:
    """Inside, this thread's networks take `scale` times what their adapters add; None is the scale that there is."""
    before, wanted = CALL.scale, CALL.scale if scale is None else scale
    check_number(wanted, "lora_scale")
    CALL.scale = wanted
    try:
        yield
    finally:
        CALL.scale = before


class LowRank(nn.Module):
    """One adapter of one layer: A (r, in) and B (out, r), or (r, in, height, width) and (out, r, 1, 1)."""

    strength = 1.0  # `set_adapters` sets it

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0):  # scale: alpha / r
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: Tensor, layer: nn.Module) -> Tensor:
        if self.A.ndim == 2:
            return F.linear(F.linear(x, self.A), self.B)
        return F.conv2d(F.conv2d(x, self.A, None, layer.stride, layer.padding), self.B)

    def delta(self) -> Tensor:
        """B A, of the weight's shape."""
        return (self.B.flatten(1) @ self.A.flatten(1)).reshape(len(self.B), *self.A.shape[1:])

    # A model's tensors are those of its folder; adapters have files of their own
    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class Adapted:
    """A layer with adapters. It is the layer that it was, of another class: parameters, names and hooks stay."""

    adapters: nn.ModuleDict  # a LowRank by its name
    active: tuple[str, ...] = ()
    enabled = True
    fused: tuple[str, ...] = ()  # those that `weight` holds now; `base` is the weight without them
    base: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.fused or not self.enabled:
            return y
        for name in self.active:
            one = self.adapters[name]
            y = y + one(x, self) * (one.strength * one.scale * CALL.scale)
        return y

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.fused:
            raise ValueError(f"the weights can't be loaded while {', '.join(self.fused)} is fused: unfuse_lora first")
        super()._load_from_state_dict(*args)


class AdaptedLinear(Adapted, Linear):
    pass


class AdaptedConv2d(Adapted, Conv2d):
    pass


KINDS = {
    **dict.fromkeys((Linear, nn.Linear), AdaptedLinear),
    **dict.fromkeys((Conv2d, nn.Conv2d), AdaptedConv2d),
}


def add(
    model: nn.Module, rank: int = 4, targets: Collection[str] = ("q", "k", "v", "out"), adapter_name: str = "default"
) -> list[nn.Parameter]:
    """Gives layers of a network an adapter, which changes nothing yet, and returns its parameters. All others freeze.

    `targets` are the ends of the layers' names, ours or the Hub's; by default those of every attention. A begins at
    random and B at zero, as in the paper; alpha is the rank. Raises TypeError or ValueError for an argument that
    doesn't fit.
    """
    if (rank := as_integer(rank, "rank")) < 1:
        raise ValueError(f"rank={rank!r} must be a whole number from 1")
    targets, there = as_names(targets, "targets"), list(layers(model))
    check_name(adapter_name, names(model))
    check_unfused(model)
    pairs, used = {}, set()
    for ours, hub, layer in there:
        if ends := [end for end in targets if any(f".{name}".endswith(f".{end}") for name in (ours, hub))]:
            W = layer.weight
            A, B = torch.randn(rank, *W.shape[1:]) / rank, torch.zeros(len(W), rank, *[1] * (W.ndim - 2))
            pairs[layer] = LowRank(A, B)
            used.update(ends)
    if not targets or (unused := [target for target in targets if target not in used]):
        what = f"no layer of this {type(model).__name__} is called {', '.join(unused)}" if targets else "name a layer"
        raise ValueError(f"targets: {what}")
    model.requires_grad_(False)
    attach(model, adapter_name, pairs)
    return [parameter for one in pairs.values() for parameter in one.parameters()]


def state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """An adapter's tensors under the Hub's names, B times alpha / r: what `save_lora_weights` writes."""
    there, known = list(layers(model)), names(model)
    adapter_name = known[0] if adapter_name is None and len(known) == 1 else adapter_name
    if adapter_name not in known:
        raise ValueError(f"adapter_name={adapter_name!r} is none of the network's: {', '.join(known) or 'it has none'}")
    tensors = {}
    for _, hub, layer in there:
        if isinstance(layer, Adapted) and adapter_name in layer.adapters:
            one = layer.adapters[adapter_name]
            tensors |= {f"{hub}.lora_A.weight": one.A.detach(), f"{hub}.lora_B.weight": one.B.detach() * one.scale}
    return tensors


def layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """The layers that can have adapters: our name, the Hub's, and the layer. Raises TypeError for another's network."""
    if not hasattr(model, "table"):
        raise TypeError(f"LoRA is for minidiff's networks, such as pipe.unet, not for a {type(model).__name__}")
    for name, layer in model.named_modules():
        if type(layer) in KINDS or isinstance(layer, Adapted):
            name = name.replace("_orig_mod.", "")  # where torch.compile has wrapped a part
            if hub := model.table.hub(f"{name}.weight"):  # else somebody has put it there
                yield name, hub.removesuffix(".weight"), layer


def adapted(model: nn.Module) -> list[Adapted]:
    return [layer for layer in model.modules() if isinstance(layer, Adapted)]


def names(model: nn.Module) -> list[str]:
    """Of all adapters, the oldest first."""
    return list(dict.fromkeys(name for layer in adapted(model) for name in layer.adapters))


def check_name(name: str, used: Collection[str]) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter_name={name!r} can't be a name here: take a word without a dot")
    if name in used:
        raise ValueError(f"adapter_name={name!r} is in use: take another, or delete_adapters({name!r}) first")


def check_unfused(*models: nn.Module) -> None:
    """What is fused draws alone: an adapter that came beside it, or left, would change nothing."""
    if fused := dict.fromkeys(name for model in models for layer in adapted(model) for name in layer.fused):
        raise ValueError(f"{', '.join(fused)} is fused: unfuse_lora or unload_lora_weights first")


def attach(model: nn.Module, name: str, pairs: Mapping[nn.Module, LowRank]) -> None:
    """Gives each layer its adapter, which alone is active in this network then, as in the reference."""
    for layer, one in pairs.items():
        if not isinstance(layer, Adapted):
            layer.__class__, layer.adapters = KINDS[type(layer)], nn.ModuleDict()
        layer.adapters[name] = one.to(layer.weight)
    activate(model, (name,))


def activate(model: nn.Module, chosen: Collection[str]) -> None:
    for layer in adapted(model):
        layer.active = tuple(name for name in chosen if name in layer.adapters)


def remove(model: nn.Module, name: str) -> None:
    """Takes an adapter away, and from layers that have no other one all that was added to them. If it alone was active,
    the oldest is then, as in the reference; one that was off leaves the others as they are."""
    active = list(dict.fromkeys(one for layer in adapted(model) for one in layer.active))
    for layer in adapted(model):
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            layer.__class__ = type(layer).__bases__[1]
            del layer.adapters
            for key in ("active", "enabled", "fused", "base"):
                vars(layer).pop(key, None)
    if name in active:
        activate(model, [other for other in active if other != name] or names(model)[:1])


def fuse(model: nn.Module, scale: float = 1.0, chosen: Collection[str] | None = None, safe: bool = False) -> None:
    """Adds adapters, by default the active ones, to the weights. The weights without are kept: where they are mapped
    from a file, that takes no memory. `safe` raises ValueError, before any change, where one wouldn't stay finite."""
    weights = {}
    for layer in adapted(model):
        here = [name for name in chosen or layer.active if name in layer.adapters and name not in layer.fused]
        W = layer.weight.data
        for one in (layer.adapters[name] for name in here):
            W = W + one.delta().detach() * (one.strength * one.scale * scale)
        if safe and not W.isfinite().all():
            raise ValueError(f"safe_fusing: {', '.join(here)} would make a weight infinite or NaN")
        weights[layer] = W, here
    for layer, (W, here) in weights.items():
        if here:
            layer.base = layer.weight.data if layer.base is None else layer.base
            layer.weight.data, layer.fused = W, (*layer.fused, *here)


def unfuse(model: nn.Module) -> None:
    """The weights without adapters again, bit for bit."""
    for layer in adapted(model):
        if layer.fused:
            layer.weight.data, layer.base, layer.fused = layer.base.to(layer.weight), None, ()
