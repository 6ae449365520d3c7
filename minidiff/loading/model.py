"""The base of all networks: a config, and weights under names of our own, with a table that maps them to the Hub's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weights_compat.rules import Table

from ..checks import check_named_tensors, check_tensors
from ..lora import adapted
from .component import Configured
from .config import Config, LoadError, read_json, write_json
from .switches import Switches
from .tensors import to_ours
from .weights import Files, read_weights, write_weights


class Model(Configured, Switches, nn.Module, abstract=True):
    """A network with a config. It holds weights alone, and lives where and in what dtype its parameters do."""

    table: ClassVar[Table]  # the Hub's names of its tensors, and ours
    weights: ClassVar[str] = "diffusion_pytorch_model"  # the stem of its file of weights
    part: ClassVar[str] = ""  # what a file that holds a whole system has it as: weights_compat/single_file.py
    model_type: ClassVar[str] = ""  # what transformers calls it, whose configs have another header
    gradient_checkpointing = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.build(self.config)

    def build(self, c: Config) -> None:
        """Makes the modules."""
        raise NotImplementedError

    @classmethod
    def read_from(cls, folder: Path, files: Files) -> Self:
        return cls.read_with(folder, files, {})

    @classmethod
    def read_with(cls, folder: Path, files: Files, overrides: Mapping[str, Any]) -> Self:
        model = cls.without_weights(folder, overrides)
        return model.filled(read_weights(folder, files, cls.table, model.shapes(), cls.__name__))

    @classmethod
    def without_weights(cls, folder: Path, overrides: Mapping[str, Any]) -> Self:
        """The network of the folder's config, on the meta device: no memory, no random first weights."""
        file = folder / "config.json"
        values = read_json(file)
        if values.get("_class_name", cls.__name__) != cls.__name__:
            raise LoadError(f"{file}: _class_name={values['_class_name']!r}, but a {cls.__name__} is asked for")
        config = cls.Config.read({**values, **overrides}, str(file))
        with torch.device("meta"):
            return cls(config)

    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.named_parameters()}

    def filled(self, tensors: Mapping[str, Tensor]) -> Self:
        """This network with these weights, which are kept without a copy, ready to be run."""
        self.load_state_dict(tensors, assign=True)
        return self.eval()

    def write_to(self, folder: Path, files: Files) -> None:
        tensors = self.checked_tensors()
        write_json(folder / "config.json", self.file_config())
        write_weights(tensors, self.weights, folder, files, self.table)

    def checked_tensors(self) -> dict[str, Tensor]:
        """Its weights by our names, to be saved.

        Raises ValueError unless a network of this config, which is what loading builds, has just these tensors.
        """
        if loose := list(dict.fromkeys(name for one in adapted(self) if not one.fused for name in one.adapters)):
            raise ValueError(
                f"this {type(self).__name__} has LoRA ({', '.join(loose)}) beside its weights, which are saved alone:"
                " save_lora_weights, then unload_lora_weights; or fuse_lora, which makes it part of the weights"
            )
        name = type(self).__name__
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in self.state_dict().items()}  # if compiled
        with torch.device("meta"):
            shapes = {key: tensor.shape for key, tensor in type(self)(self.config).state_dict().items()}
        strange = [key for key in tensors if key not in shapes]
        if strange or shapes.keys() - tensors.keys():
            lacking = [key for key in shapes if key not in tensors]
            raise ValueError(
                f"this {name} isn't what its config makes, and a folder of it couldn't be loaded. Without a place:"
                f" {few(strange)}. Missing: {few(lacking)}. If layers were wrapped or replaced (LoRA's, say), merge"
                " them first, or keep their tensors apart: model.state_dict() has them"
            )
        for key, tensor in tensors.items():
            if tensor.shape != shapes[key]:
                made = f"but its config makes it {tuple(shapes[key])}"
                raise ValueError(f"{key} of this {name} has shape {tuple(tensor.shape)}, {made}")
            if tensor.is_meta:
                raise ValueError(f"{key} of this {name} is on the meta device: there is no value to save")
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """torch's own, and takes the Hub's names and forms of tensors too."""
        check_named_tensors(state_dict, "state_dict")
        ours = self.state_dict().keys()
        found: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            if name not in ours and self.table.is_ignored(name):
                continue
            places = [] if name in ours else self.table.places(name)
            for place, change in places or [(name, "same")]:
                if place in found:
                    raise ValueError(f"state_dict has {place} twice, under our name and as {name}")
                found[place] = to_ours(change, tensor)
        return super().load_state_dict(found, strict=strict, assign=assign)

    def file_config(self) -> dict[str, Any]:
        kept = super().file_config()
        kept.pop("dtype", None)  # transformers 5's name of torch_dtype, as the file said it that this was loaded from
        return kept

    def header(self) -> dict[str, Any]:
        if not self.model_type:
            return super().header()
        dtype = str(self.dtype).removeprefix("torch.")
        return {"architectures": [type(self).__name__], "model_type": self.model_type, "torch_dtype": dtype}

    def enable_gradient_checkpointing(self) -> None:
        """Training then keeps the inputs of each level alone, and computes the rest again on the way back."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def through(self, block: nn.Module, *inputs: Any) -> Any:
        """What `block` makes of `inputs`, checkpointed where that is asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check_inputs(self, **inputs: torch.Tensor) -> None:
        """Raises a TypeError that names the first input that is no tensor, or not of the weights' dtype."""
        check_tensors(**inputs)
        for name, value in inputs.items():
            if value.dtype != self.dtype and not torch.is_autocast_enabled(value.device.type):
                raise TypeError(f"{name} is {value.dtype}, but this {type(self).__name__} is {self.dtype}: convert one")

    __repr__ = nn.Module.__repr__

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def few(names: list[str]) -> str:
    """The first three of them, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
