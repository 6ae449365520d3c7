"""For training: an average of the weights (EMA), signal-to-noise ratios, seeds."""

import copy
import os
import random
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from .loading.model import Model
from .missing import getter
from .schedulers.base import Scheduler

__all__ = ["EMAModel", "cast_training_params", "compute_snr", "set_seed"]
__getattr__ = getter(__name__, __all__)

STATE = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


class EMAModel:
    """An exponential moving average of weights: `shadow = decay shadow + (1 - decay) weights` after each step.

    The decay grows with the number of steps n, up to `decay`: (1 + n) / (10 + n), or, with `use_ema_warmup`,
    1 - (1 + n / inv_gamma)^-power (Katherine Crowson's: a power of 2/3 for a million steps, 3/4 for fewer).
    `update_after_step`: steps before which the average is a copy. `foreach` asks the reference for a faster way to the
    same numbers; there is one way here.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: type[Model] | None = None,
        model_config: Any | None = None,
    ):
        self.shadow_params = [p.detach().clone() for p in _parameters(parameters)]
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.model_cls, self.model_config = model_cls, model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None  # of the last step
        self.temp_stored_params: list[Tensor] | None = None

    def get_decay(self, optimization_step: int) -> float:
        n = optimization_step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        decay = 1 - (1 + n / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + n) / (10 + n)
        return max(min(decay, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Call it after each of the optimizer's steps."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for shadow, p in self._pairs(parameters):
            if p.requires_grad:
                shadow.sub_((1 - self.cur_decay_value) * (shadow - p))
            else:
                shadow.copy_(p)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes the average into `parameters`."""
        for shadow, p in self._pairs(parameters):
            p.copy_(shadow)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keeps a copy of `parameters` on the CPU, for `restore`."""
        self.temp_stored_params = [p.detach().cpu().clone() for p in _parameters(parameters)]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Writes back what `store` kept, and forgets it."""
        if self.temp_stored_params is None:
            raise RuntimeError("there is nothing to restore: call store first")
        for stored, p in zip(self.temp_stored_params, _parameters(parameters), strict=True):
            p.copy_(stored)
        self.temp_stored_params = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> None:
        """Moves and converts the average."""
        self.shadow_params = [
            p.to(device, dtype if p.is_floating_point() else None, non_blocking) for p in self.shadow_params
        ]

    def state_dict(self) -> dict[str, Any]:
        """Numbers and `shadow_params`, which aren't copied."""
        return {key: getattr(self, key) for key in STATE} | {"shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave; what isn't in it stays. Raises ValueError for a value that doesn't fit."""
        state = copy.deepcopy({**self.state_dict(), **state_dict})
        if unknown := state.keys() - {*STATE, "shadow_params"}:
            raise ValueError(f"state_dict has the unknown keys {', '.join(sorted(unknown))}")
        kinds = {"optimization_step": int, "update_after_step": int, "use_ema_warmup": bool}
        for key in STATE:
            if not isinstance(state[key], kinds.get(key, int | float)):
                raise ValueError(f"{key}={state[key]!r} of state_dict must be of type {kinds.get(key, float).__name__}")
        if not 0 <= state["decay"] <= 1:
            raise ValueError(f"decay={state['decay']} of state_dict must lie in 0..1")
        shapes = [p.shape for p in state["shadow_params"]]
        if shapes != [p.shape for p in self.shadow_params]:
            raise ValueError("shadow_params of state_dict have other shapes than the parameters that are averaged")
        vars(self).update(state)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """The folder of a model with the averaged weights; the state stands in its config.json."""
        if self.model_cls is None or self.model_config is None:
            raise ValueError("model_cls and model_config must have been given, for save_pretrained to make a model")
        state = {key: getattr(self, key) for key in STATE}
        model = self.model_cls.from_config({**self.model_config, **state})
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, model_cls: type[Model], foreach: bool = False) -> Self:
        """The average in a folder that `save_pretrained`, here or in the reference, wrote."""
        model = model_cls.from_pretrained(path)
        config = {key: value for key, value in model.config.explicit().items() if key not in STATE}
        ema = cls(model.parameters(), model_cls=model_cls, model_config=config, foreach=foreach)
        ema.load_state_dict({key: model.config[key] for key in STATE if key in model.config})
        return ema

    def _pairs(self, parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = _parameters(parameters)
        if len(parameters) != len(self.shadow_params):
            raise ValueError(f"parameters are {len(parameters)}, but {len(self.shadow_params)} are averaged")
        return [(shadow, p) for shadow, p in zip(self.shadow_params, parameters, strict=True)]


def _parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    if isinstance(parameters, nn.Module):
        raise TypeError("parameters must be model.parameters(), not the model")
    return list(parameters)


def compute_snr(noise_scheduler: Scheduler, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratios alpha^2 / sigma^2 at `timesteps`, in their shape and on their device; float32.

    For weighting a loss (Efficient diffusion training via min-SNR weighting, arXiv 2303.09556).
    """
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return (alpha_bar**0.5 / (1 - alpha_bar) ** 0.5) ** 2


def cast_training_params(model: nn.Module | list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """Converts the parameters that train, and leaves the frozen ones in half precision, say."""
    for one in model if isinstance(model, list) else [model]:
        for p in one.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)


def set_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's own random numbers, the latter on every device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
