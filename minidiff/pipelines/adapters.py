"""What a pipeline does with LoRA: load, mix, switch off, fuse, save. What LoRA is stands in minidiff/lora.py.

The state is the layers' own, so pipelines that share a network share its adapters.
"""

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import lora
from ..checks import as_names, check_named_tensors, check_number
from ..loading.adapters import LORA, find_file, match_lora, read_lora, write_lora
from ..loading.arguments import DOWNLOADS, LOADING, check_keywords
from ..loading.model import Model
from .run import Runs

PLACE = re.compile(r"(down|mid|up)_block(?:s\.(\d+)\.\w+|\.attentions)\.(\d+)\.")  # the Hub's name of a layer in one
FILE_ARGUMENTS = ("weight_name", "subfolder", "use_safetensors", *DOWNLOADS)


def file_or_given(owner: str, source: Any, usual: tuple[str, ...], keywords: dict[str, Any], given: Any) -> Any:
    """The file that a path and the keywords of a `load_...` mean; or the tensors that were given in its place."""
    taken = check_keywords(keywords, LOADING, owner, FILE_ARGUMENTS)
    found = source if isinstance(source, given) else find_file(source, usual, **taken)
    idle = [name for name in ("weight_name", "subfolder") if taken.get(name)]
    if idle and (found is source or found == Path(source)):
        warnings.warn(f"{' and '.join(idle)} has no effect beside a file or tensors", stacklevel=3)
    return found


class LoraSwitches(Runs):
    """LoRA, for the pipelines of Stable Diffusion."""

    _cross_attention_kwargs: dict[str, Any] | None = None
    _lora_loadable_modules: ClassVar[tuple[str, ...]] = ("unet", "text_encoder", "text_encoder_2")

    @contextmanager
    def running(self, *, cross_attention_kwargs: dict[str, float] | None = None, **settings: Any) -> Iterator[Self]:
        """As in `Runs`; {"scale": ...} is what this call takes of all adapters."""
        if cross_attention_kwargs and not self.get_active_adapters():
            warnings.warn("cross_attention_kwargs has no effect: no LoRA is active", stacklevel=5)
        scale = (cross_attention_kwargs or {}).get("scale", 1.0)
        with super().running(**settings, cross_attention_kwargs=cross_attention_kwargs) as run, lora.scaled(scale):
            yield run

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **keywords: Any,
    ) -> None:
        """Reads a LoRA for the UNet and the text encoders. In those that it has tensors for, it alone is active then
        (`set_adapters` mixes several).

        A file, a folder or Hub repository (`weight_name`, `subfolder`, huggingface_hub's keywords), or its tensors; of
        diffusers, peft or kohya's scripts. Raises LoadError for a file that isn't one or doesn't fit, ValueError for
        an argument; the pipeline is then as it was.
        """
        if hotswap:
            raise ValueError("hotswap isn't supported: delete_adapters, then load")
        known = {name for names in self.get_list_adapters().values() for name in names}
        free = next(name for name in map("default_{}".format, range(len(known) + 1)) if name not in known)
        name = free if adapter_name is None else adapter_name
        lora.check_name(name, known)
        models = self._with_adapters()
        lora.check_unfused(*models.values())
        source = file_or_given(type(self).__name__, pretrained_model_name_or_path_or_dict, LORA, keywords, Mapping)
        tensors, header = (source, {}) if isinstance(source, Mapping) else read_lora(source)
        where = "the given tensors" if isinstance(source, Mapping) else str(source)
        for component, pairs in match_lora(tensors, header, models, where).items():
            lora.attach(models[component], name, pairs)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        text_encoder_2_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a file that `load_lora_weights` takes here and in the reference.

        Layers: a network with one adapter, or tensors under the Hub's names (`minidiff.lora.state_dict`). Metadata:
        what peft's config says, where alpha isn't the rank.
        """
        layers = (unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers)
        says = (unet_lora_adapter_metadata, text_encoder_lora_adapter_metadata, text_encoder_2_lora_adapter_metadata)
        tensors, header = {}, {}
        for component, found, said in zip(cls._lora_loadable_modules, layers, says, strict=True):
            found = lora.state_dict(found) if isinstance(found, nn.Module) else {} if found is None else found
            check_named_tensors(found, f"{component}_lora_layers, if it is no network,")
            if not isinstance(said, Mapping | None):
                raise TypeError(f"{component}_lora_adapter_metadata must be a dictionary, not {said!r:.100}")
            tensors |= {f"{component}.{key}": tensor for key, tensor in found.items()}
            header |= {f"{component}.{key}": value for key, value in (said or {}).items()}
        if not tensors:
            raise ValueError("unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers: give one")
        if save_function is not None or not safe_serialization:
            raise ValueError("LoRA is saved as safetensors: leave out save_function and safe_serialization")
        if is_main_process:
            write_lora(save_directory, weight_name or LORA[0], tensors, header)

    def set_adapters(
        self, adapter_names: str | list[str], adapter_weights: float | dict | list[float | dict | None] | None = None
    ) -> None:
        """Makes these adapters active, and no other, each with its weight (1 if None).

        A weight may be a dict by component, and the UNet's one by blocks, as in the reference: {"unet": {"mid": 0.5,
        "down": 0, "up": {"block_0": [0.1, 0.2, 0.3]}}, "text_encoder": 0.5}. What isn't named has 1, and so have, where
        blocks are, those without attention and the layers outside.
        """
        names = as_names(adapter_names, "adapter_names")
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        self._check_loaded(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights has {len(weights)} for {len(names)} adapter_names")
        lora.check_unfused(*self._with_adapters().values())
        strengths = {}
        for name, weight in zip(names, weights, strict=True):
            tree = {component: branches(model, name) for component, model in self._with_adapters().items()}
            strengths |= spread(weight, tree, "adapter_weights")
            parts, there = weight if isinstance(weight, Mapping) else (), self.get_list_adapters()
            if idle := [component for component in parts if name not in there.get(component, ())]:
                warnings.warn(f"adapter_weights: {name} has no tensors for {', '.join(idle)}", stacklevel=2)
        for one, value in strengths.items():
            one.strength = value
        for model in self._with_adapters().values():
            lora.activate(model, names)

    def get_active_adapters(self) -> list[str]:
        layers = (layer for model in self._with_adapters().values() for layer in lora.adapted(model))
        return list(dict.fromkeys(name for layer in layers for name in layer.active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """All adapters of each component that has any."""
        return {component: names for component, model in self._with_adapters().items() if (names := lora.names(model))}

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        names = as_names(adapter_names, "adapter_names")
        self._check_loaded(names)
        lora.check_unfused(*self._with_adapters().values())
        for name in names:
            for model in self._with_adapters().values():
                lora.remove(model, name)

    def unload_lora_weights(self) -> None:
        """Removes all adapters. What is fused stays in the weights."""
        for model in self._with_adapters().values():
            for name in lora.names(model):
                lora.remove(model, name)

    def disable_lora(self) -> None:
        """Draws without adapters, which stay loaded. What was fused is taken out of the weights."""
        self.unfuse_lora()
        self._enable(False)

    def enable_lora(self) -> None:
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for model in self._with_adapters().values():
            for layer in lora.adapted(model):
                layer.enabled = enabled

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | list[str] | None = None,
    ) -> None:
        """Adds `lora_scale` times the active adapters, or those of `adapter_names`, to the weights: calls take no
        longer than without. `safe_fusing`: nothing is fused where a weight wouldn't stay finite."""
        check_number(lora_scale, "lora_scale")
        chosen = as_names(adapter_names or (), "adapter_names")
        self._check_loaded(chosen)
        models = nn.ModuleList(self._with_adapters(components).values())  # as one, of which all or nothing is fused
        lora.fuse(models, lora_scale, chosen, safe_fusing)

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """The weights as they were before `fuse_lora`, bit for bit: they were kept."""
        for model in self._with_adapters(components).values():
            lora.unfuse(model)

    def _check_loaded(self, adapter_names: Collection[str]) -> None:
        loaded = {name for names in self.get_list_adapters().values() for name in names}
        if unknown := [name for name in adapter_names if name not in loaded]:
            there = ", ".join(sorted(loaded)) or "none"
            raise ValueError(f"adapter_names has {', '.join(unknown)}; loaded: {there}")

    def _with_adapters(self, components: str | list[str] | None = None) -> dict[str, Model]:
        """The networks that can have adapters, or those of `components`."""
        components = as_names(components or (), "components")
        parts = {name: self.components.get(name) for name in components or self._lora_loadable_modules}
        models = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # torch.compile wraps it
        fitting = {name: models[name] for name in self._lora_loadable_modules if isinstance(models.get(name), Model)}
        if wrong := [name for name in components if name not in fitting]:
            raise ValueError(f"components has {', '.join(wrong)}, which this pipeline has no LoRA for")
        return fitting


def branches(model: Model, name: str) -> dict[str, Any]:
    """The adapters `name` of a network, by what `set_adapters` calls their places: {"down": {"block_1": {"0": [...]}},
    "mid": {"": {"0": [...]}}, "": ...}. As in the reference, these are attentions; the other layers of a block go with
    the attention of their number, and "" has the rest."""
    found = [(PLACE.match(hub), hub, layer) for _, hub, layer in lora.layers(model)]
    places = {match.groups() for match, hub, _ in found if match and ".attentions." in hub}
    tree: dict[str, Any] = {}
    for match, _, layer in found:
        way, block, number = match.groups("") if match and match.groups() in places else ("", "", "")
        ones = tree.setdefault(way, {}).setdefault(block and f"block_{block}", {}).setdefault(number, [])
        ones += [layer.adapters[name]] if name in getattr(layer, "adapters", ()) else []
    return tree


def spread(weight: Any, tree: dict | list, where: str) -> dict[lora.LowRank, float]:
    """What a `weight` of `set_adapters` gives each adapter of a `tree` of them."""
    weight = 1.0 if weight is None else weight
    if isinstance(tree, list) or not isinstance(weight, Mapping | list):
        check_number(weight, where)
    if isinstance(tree, list):
        return dict.fromkeys(tree, float(weight))
    if isinstance(weight, list) and isinstance(next(iter(tree.values())), list):
        if len(weight) not in (1, len(tree)):
            raise ValueError(f"{where} has {len(weight)} weights; it takes {len(tree)}")
        weight = dict(zip(tree, weight * len(tree), strict=False))
    own = weight if isinstance(weight, Mapping) else dict.fromkeys(tree, weight)
    if unknown := [str(key) for key in own if key not in tree]:
        raise ValueError(f"{where} has {', '.join(unknown)}; it may have {', '.join(filter(None, tree)) or 'no parts'}")
    found = (spread(own.get(key), part, f"{where}[{key!r}]" if key else where) for key, part in tree.items())
    return {one: value for values in found for one, value in values.items()}
