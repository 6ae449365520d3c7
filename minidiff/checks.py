"""Checks of arguments: an error names the one that is wrong."""

import math
import numbers
import operator
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch


def check_tensors(**arguments) -> None:
    """Raises a TypeError that names the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, but is {value!r}")


def check_named_tensors(tensors: Any, name: str) -> None:
    """Raises a TypeError that names the argument unless it is a dictionary of tensors by texts."""
    wrong = [key for key in tensors if not isinstance(key, str)] if isinstance(tensors, Mapping) else [tensors]
    if wrong:
        raise TypeError(f"{name} must be a dictionary of tensors by name; {wrong[0]!r:.100} is none, nor a name")
    check_tensors(**tensors)


def as_names(value: Any, name: str) -> list[str]:
    """A name, or any number of them, as a list. A TypeError names the argument."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple | Set) or not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} must be a name or a list of names, not {value!r:.100}")
    return list(names)


def as_integer(value: Any, name: str) -> int:
    """`value` as an int: it may be one, NumPy's, or a tensor of one integer. A TypeError names the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, but is {value!r}") from None


def check_number(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises a TypeError or a ValueError that names the argument unless it is a finite number, in `least`..`most`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but is {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        above = f", and {least} or more" if least > -math.inf else ""
        raise ValueError(f"{name}={value} must be finite{above if most == math.inf else f', and in {least}..{most}'}")


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """What fails within is told with the argument that asked for it, as a ValueError."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ValueError(f"{argument}: {error}") from error
