"""The engine: a table of name templates, read in both directions.

A table maps the Hub's tensor names to ours and back. Each row pairs two templates for a module; `{}` stands for a
number, the same ones in the same order on both sides; what follows the module (`weight`, `bias`) is kept:

    ("down_blocks.{}.resnets.{}.time_emb_proj", "down.{}.resnets.{}.time_proj")

A third column says how a tensor changes on the way, where it does, and `bare` names a tensor that is no module's:

    ("proj_in", "proj_in", "convolution")                         (out, in, 1, 1) there, (out, in) here
    ("projection", "projection", "transpose")
    bare("attn.in_proj_weight", "attention.k.weight", "third 1")  the second of three, which are one tensor there

A name that no row knows is nobody's: `ours` and `hub` return None, and the loader says so. `aliases` are other names
that files on the Hub have for the same tensors; they are read, never written. `ignored` are tensors that hold nothing.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple


class Row(NamedTuple):
    """A pair, as most tables write it, is a row that changes nothing."""

    hub: str
    ours: str
    change: str = "same"
    ends: tuple[str, ...] = (".weight", ".bias")


def bare(hub: str, ours: str, change: str = "same") -> Row:
    """A row for one tensor, whose whole name it gives."""
    return Row(hub, ours, change, ends=("",))


def nested(hub: str, ours: str, rows: Iterable[tuple]) -> list[tuple]:
    """`rows` of a block, at a place: both prefixes are put in front."""
    return [(f"{hub}.{a}", f"{ours}.{b}", *rest) for a, b, *rest in rows]


def same(*names: str) -> list[tuple]:
    """Rows for modules whose name on the Hub is as good as any."""
    return [(name, name) for name in names]


class Table:
    def __init__(self, rows: Iterable[tuple], aliases: Iterable[tuple] = (), ignored: tuple[str, ...] = ()):
        self.rows, self.aliases = [Row(*row) for row in rows], [Row(*row) for row in aliases]
        self.ignored = frozenset(ignored)
        self._to_ours = _Templates(self.rows)
        self._to_hub = _Templates([row._replace(hub=row.ours, ours=row.hub) for row in self.rows])
        self._modern = _Templates(self.aliases)

    def places(self, name: str) -> list[tuple[str, str]]:
        """Where the tensor goes that a file calls `name`: our name and the change on the way; three for thirds."""
        modern = self._modern(name)
        return self._to_ours(modern[0][0] if modern else name)

    def origin(self, name: str) -> tuple[str, str] | None:
        """The Hub's name of our tensor `name`, and the change on the way from there."""
        return next(iter(self._to_hub(name)), None)

    def ours(self, name: str) -> str | None:
        """Our name of the tensor that a file calls `name`, or None."""
        return next((ours for ours, _ in self.places(name)), None)

    def hub(self, name: str) -> str | None:
        """The Hub's name of our tensor `name`, or None."""
        origin = self.origin(name)
        return origin and origin[0]

    def knows(self, names: Iterable[str]) -> int:
        """How many of a file's names are in the table."""
        return sum(bool(self.places(name)) for name in names)

    def is_ignored(self, name: str) -> bool:
        return name in self.ignored


class _Templates:
    """Rewrites names. Each row is tried in turn: a network's 1,700 names take some 30 ms."""

    def __init__(self, rows: list[Row]):
        self._rows = rows

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str, str]]:
        found = []
        for source, target, change, ends in self._rows:
            numbers = re.escape(source).replace(r"\{\}", "([0-9]+)")
            found.append((re.compile(f"{numbers}({'|'.join(map(re.escape, ends))})"), f"{target}{{}}", change))
        return found

    def __call__(self, name: str) -> list[tuple[str, str]]:
        tried = ((pattern.fullmatch(name), target, change) for pattern, target, change in self._patterns)
        return [(target.format(*match.groups()), change) for match, target, change in tried if match]
