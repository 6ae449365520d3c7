"""A pipeline's switches for speed and memory: what they do here, or that there is nothing to do.

Offloaded models wait on the CPU, and come to the device when they compute: slower, with less memory there.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import layers

Handles = tuple[torch.utils.hooks.RemovableHandle, ...]


class MemorySwitches:
    """The switches, for `DiffusionPipeline`."""

    _offload_device: torch.device | None = None
    _hooks: Handles = ()

    def optimize(self) -> None:
        """Draws quicker from now on, on a CPU, if the networks are large: layers take the ways of minidiff/layers.py.
        They cost memory, 16/9 of the weights of large convolutions (twice as much in half precision that the CPU can't
        multiply), and other roundings: see there.

        Elsewhere nothing changes, and a warning says so.
        """
        device = self._offload_device or self.device
        if device.type != "cpu":
            serves = "torch.compile(pipe.unet) may serve"
            warnings.warn(f"optimize() has no effect on {device}, but on a CPU: {serves}", stacklevel=2)
        for model in self._models():
            layers.prepare(model)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Nothing to do: attention never holds its whole matrix here (minidiff/layers.py)."""

    def disable_attention_slicing(self) -> None:
        """Nothing to do, as above."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing to do: torch has the same algorithm, and it is used always."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing to do, as above."""

    def enable_vae_slicing(self) -> None:
        """One picture at a time through the VAE."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Large pictures in overlapping tiles through the VAE."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Models wait on the CPU; the one that computes is on `device`."""
        self._offload(offload_models, gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Models wait on the CPU; the layer that computes is on `device`."""
        self._offload(offload_layers, gpu_id, device)

    def remove_all_hooks(self) -> None:
        """Ends the offloading. The models stay where they are: `to` moves them."""
        for handle in self._hooks:
            handle.remove()
        for model in self._models():
            vars(model).pop("computes_on", None)
        self._hooks, self._offload_device = (), None

    def _offload(self, how: Callable, gpu_id: int | None, device: torch.device | str) -> None:
        self.remove_all_hooks()
        try:
            chosen = torch.device(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={str(device)!r} can't be used here: {str(error).splitlines()[0]}") from None
        self._hooks, self._offload_device = how(self._teams(), chosen), chosen
        for model in self._models():
            model.computes_on = chosen

    def _teams(self) -> list[list[nn.Module]]:
        """The models; those that take turns at every step come and go together."""
        return [[model] for model in self._models()]


def device_of(model: Any, otherwise: torch.device | None = None) -> torch.device:
    """Where a model computes, which isn't where it is while it is offloaded. Somebody's function may have no weights,
    and computes where it likes: `otherwise`."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    places = (parameter.device for parameter in parameters)
    return getattr(model, "computes_on", None) or next(places, otherwise or torch.device("cpu"))


def offload_models(teams: list[list[nn.Module]], device: torch.device) -> Handles:
    """One team at a time is on the device: the next one that computes sends it back. Most of the speed stays."""
    here: list[nn.Module] = []

    def bring(team: list[nn.Module]) -> None:
        if here != team:
            for other in here:
                other.to("cpu")
            here[:] = [model.to(device) for model in team]

    pairs = []
    for team in teams:
        for model in team:
            # VAEs compute through `encode` and `decode`, not `forward`: so every module calls for the whole model
            pairs += [(team, module) for module in model.to("cpu").modules()]
    return tuple(module.register_forward_pre_hook(lambda *_, team=team: bring(team)) for team, module in pairs)


def offload_layers(teams: list[list[nn.Module]], device: torch.device) -> Handles:
    """One layer at a time is on the device, for as long as it computes: the least memory, and by far the slowest."""

    def with_weights() -> Iterator[nn.Module]:
        for model in (model for team in teams for model in team):
            model.to("cpu")
            yield from (
                module for module in model.modules() if next(module.parameters(recurse=False), None) is not None
            )

    handles = []
    for layer in with_weights():
        handles.append(layer.register_forward_pre_hook(lambda layer, _: layer.to(device) and None))
        handles.append(layer.register_forward_hook(lambda layer, *_: layer.to("cpu") and None))
    return tuple(handles)
