"""The engine: a table of name templates, read in both directions.

A table maps the Hub's tensor names to ours and back. Each row pairs two templates for a module; `{}` stands for a
number, the same ones in the same order on both sides; what follows the module (`weight`, `bias`) is kept:

    ("down_blocks.{}.resnets.{}.time_emb_proj", "down.{}.resnets.{}.time_proj")

A name that no row knows is nobody's: `ours` and `hub` return None, and the loader says so. `aliases` are other names
that files on the Hub have for the same tensors; they are read, never written. `ignored` are tensors that hold nothing.
"""

import re
from collections.abc import Iterable
from functools import cached_property

Row = tuple[str, str]

PARAMETERS = ("weight", "bias")


def nested(hub: str, ours: str, rows: Iterable[Row]) -> list[Row]:
    """`rows` of a block, at a place: both prefixes are put in front."""
    return [(f"{hub}.{a}", f"{ours}.{b}") for a, b in rows]


def same(*names: str) -> list[Row]:
    """Rows for modules whose name on the Hub is as good as any."""
    return [(name, name) for name in names]


class Table:
    def __init__(self, rows: list[Row], aliases: list[Row] | None = None, ignored: tuple[str, ...] = ()):
        self.rows, self.aliases = rows, aliases or []
        self._to_ours = _Templates(rows)
        self._to_hub = _Templates((ours, hub) for hub, ours in rows)
        self._modern = _Templates(self.aliases)
        self._ignored = {_shape_of(name) for name in ignored}

    def ours(self, name: str) -> str | None:
        """Our name of the tensor that a file calls `name`, or None."""
        return self._to_ours(self._modern(name) or name)

    def hub(self, name: str) -> str | None:
        """The Hub's name of our tensor `name`, or None."""
        return self._to_hub(name)

    def is_ignored(self, name: str) -> bool:
        return _shape_of(name) in self._ignored


class _Templates:
    """Rewrites names by the one template that fits: templates are found by their shape, with all numbers left out."""

    def __init__(self, rows: Iterable[Row]):
        self._rows = list(rows)

    @cached_property
    def _by_shape(self) -> dict[str, list[tuple[re.Pattern, str]]]:
        found: dict[str, list[tuple[re.Pattern, str]]] = {}
        for source, target in self._rows:
            pattern = re.compile(re.escape(source).replace(r"\{\}", "([0-9]+)"))
            found.setdefault(_shape_of(source), []).append((pattern, target))
        return found

    def __call__(self, name: str) -> str | None:
        module, _, parameter = name.rpartition(".")
        if parameter not in PARAMETERS:
            return None
        for pattern, target in self._by_shape.get(_shape_of(module), ()):
            if match := pattern.fullmatch(module):
                return f"{target.format(*match.groups())}.{parameter}"
        return None


def _shape_of(name: str) -> str:
    return re.sub(r"\{\}|[0-9]+(?=\.|$)", "#", name)
