"""What calls return: named tuples that read in every way of the reference's outputs."""

from collections.abc import Iterator
from typing import Any


def output(cls: type) -> type:
    """Lets a NamedTuple read by key too: `out.sample`, `out["sample"]`, `out[0]`, `out.keys()`, `sample, = out`."""

    def get(self: tuple, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key not in self._fields:
            raise KeyError(f"{cls.__name__} has no {key!r}; it has {', '.join(self._fields)}")
        return getattr(self, key)

    def items(self: tuple) -> Iterator[tuple[str, Any]]:
        return zip(self._fields, self, strict=True)

    cls.__getitem__, cls.items = get, items
    cls.keys, cls.values = lambda self: self._fields, lambda self: tuple(self)
    cls.to_tuple = lambda self: tuple(self)
    return cls
