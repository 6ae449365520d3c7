"""Helpers around torch: seeded noise, and what `torch.compile` wraps."""

from typing import Any

from torch import nn

from ..missing import getter
from ..noise import randn_tensor

__all__ = ["is_compiled_module", "randn_tensor", "unwrap_module"]
__getattr__ = getter(__name__, __all__)


def is_compiled_module(module: Any) -> bool:
    """Whether `torch.compile` made it. Told by its attribute: the class is in torch's compiler, slow to import."""
    return isinstance(module, nn.Module) and "_orig_mod" in module._modules


def unwrap_module(module: nn.Module) -> nn.Module:
    """The module that was compiled, or itself."""
    return module._orig_mod if is_compiled_module(module) else module
