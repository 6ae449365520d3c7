"""The house: which file may import which. Imports inside functions count, those for type checkers alone don't."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The first prefix that fits a module gives its floor; imports go down, or stay on a floor within one room
FLOORS = {
    "weights_compat.verify": 5,
    "weights_compat.bench": 5,
    "weights_compat.sweep": 5,
    "weights_compat.sides": 5,
    "weights_compat.stages": 5,
    "weights_compat.manifests": 5,
    "weights_compat.random_folder": 5,
    "weights_compat": 0,
    "minidiff.noise": 0,
    "minidiff.images": 0,
    "minidiff.image_processor": 0,  # a door, but of code that pipelines need
    "minidiff.missing": 0,
    "minidiff.checks": 0,
    "minidiff.outputs": 0,
    "minidiff.layers": 0,  # of networks, and lora's
    "minidiff.winograd": 0,  # layers' own
    "minidiff.lora": 0,  # a name that readers type, of layers alone
    "minidiff.loading": 1,
    "minidiff.models": 2,
    "minidiff.schedulers": 2,
    "minidiff.pipelines": 3,
    "minidiff": 4,
}
ROOMS = ("minidiff.models", "minidiff.schedulers")  # of one floor, and apart

# Of torch in the tables, say: what a part may not even import from outside
FOREIGN = {"weights_compat": {"torch"}}


def modules(root: Path) -> dict[str, Path]:
    """Every module of both packages, by name."""
    files = [file for top in ("minidiff", "weights_compat") for file in (root / top).rglob("*.py")]
    names = (".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return dict(zip(names, files, strict=True))


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, wherever in it; those of `known` by their full name."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                found.add(inside if inside in known else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found - {name}


def floor(name: str) -> int:
    return next(level for prefix, level in FLOORS.items() if f"{name}.".startswith(f"{prefix}."))


def room(name: str) -> str | None:
    return next((prefix for prefix in ROOMS if f"{name}.".startswith(f"{prefix}.")), None)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every path that comes back to where it began, once for each way that closes it."""
    found, done = [], set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def faults(root: Path) -> list[str]:
    """All that is wrong with the imports of the packages under `root`."""
    known = modules(root)
    everything = {name: imports(name, file, known) for name, file in known.items()}
    graph = {name: {other for other in found if other in known} for name, found in everything.items()}
    wrong = ["circle: " + " -> ".join(circle) for circle in circles(graph)]
    for name, found in graph.items():
        for other in found:
            apart = room(name) and room(other) and room(name) != room(other)
            if floor(other) > floor(name) or apart:
                wrong.append(f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})")
    for name, found in everything.items():
        for prefix, not_allowed in FOREIGN.items():
            tops = {other.partition(".")[0] for other in found}
            if floor(name) == 0 and name.startswith(prefix) and tops & not_allowed:
                wrong.append(f"{name} imports {', '.join(sorted(tops & not_allowed))}")
    return wrong


def test_imports_run_downwards_and_in_no_circle():
    assert faults(ROOT) == []


def test_every_module_has_a_floor_and_a_first_line_that_says_what_it_is():
    for name, file in modules(ROOT).items():
        assert floor(name) in range(6)
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), name


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("noise.py", "from .loading import config", "minidiff.noise (floor 0) imports minidiff.loading.config"),
        ("loading/config.py", "def f():\n    from ..models import unet", "minidiff.loading.config (floor 1) imports"),
        ("models/unet.py", "import minidiff.schedulers", "minidiff.models.unet (floor 2) imports minidiff.schedulers"),
        ("loading/config.py", "from .hub import fetch", "circle: minidiff.loading.config -> minidiff.loading.hub ->"),
    ],
)
def test_wrong_imports_are_found(tmp_path, file, line, message):
    """The test above can fail: one line more in a copy of the house, and it says which."""
    for source in modules(ROOT).values():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    wrong = tmp_path / "minidiff" / file
    wrong.write_text(wrong.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert any(message in fault for fault in faults(tmp_path)), faults(tmp_path)


def test_imports_for_type_checkers_do_not_count(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import json\n")
    assert imports("module", file, {}) == {"typing", "json"}
