"""The notebooks: each runs from a clean kernel, without a network, and shows what its committed outputs show."""

import re
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 180  # of one core, of a Zen 3: by the clock, the machine's other work would count. A Zen 5 takes half

# Python runs this file first, in the kernel and in what it starts: there is this machine, and nothing else
NO_NETWORK = """
import socket
connect = socket.socket.connect
def local_only(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook asked for {address}")
    return connect(self, address)
socket.socket.connect = local_only
"""


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """The kinds of a cell's outputs: streams by name, results and pictures by what they hold."""
    return sorted({str(output.get("name") or sorted(output.data)) for output in cell.outputs})


def run(notebook, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # no settings and no caches of this user
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two tests run side by side
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_was_committed(path, tmp_path, monkeypatch):
    committed = nbformat.read(path, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fresh = run(nbformat.read(path, as_version=4), tmp_path, monkeypatch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    for before, after in zip(code(committed), code(fresh), strict=True):
        assert shown(before) == shown(after), after.source
        assert "stderr" not in shown(after), after.source
        if "show(" in after.source and "def show" not in after.source:
            assert "image/png" in str(shown(after)), after.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_whole(path):
    """As it reads without running: in order, with outputs, an opening that names a file, and exercises at the end."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert sum("assert" in cell.source for cell in code(notebook)) >= 1
    assert notebook.cells[0].source.startswith(f"# {int(path.stem[:2])} · ")
    assert re.search(r"\]\([\w./]+\.py\)", notebook.cells[0].source)
    assert "## Exercises\n\n1. " in notebook.cells[-1].source and "\n3. " in notebook.cells[-1].source


def test_the_folder_is_complete_and_light():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(9)]
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 12 * 2**20


BREAKS = {  # one slip each, made before the first cell
    "01_noise_and_denoising": """
from minidiff.schedulers.base import Scheduler as S
add_noise = S.add_noise
S.add_noise = lambda self, x, noise, t: add_noise(self, x, 1.05 * noise, t)
""",
    "04_vae": """
from minidiff.models.vae import DiagonalGaussianDistribution as D
D.std = property(lambda self: self.logvar.exp())
""",
    "05_clip": """
from minidiff.models.clip import Layer
forward = Layer.forward
Layer.forward = lambda self, x, mask: forward(self, x, mask | True)
""",
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_assertions_notice_broken_code(name, tmp_path, monkeypatch):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BREAKS[name]))
    with pytest.raises(CellExecutionError) as caught:
        run(notebook, tmp_path, monkeypatch)
    assert caught.value.ename == "AssertionError"


def test_no_network_means_none(tmp_path, monkeypatch):
    source = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(CellExecutionError, match="a notebook asked for"):
        run(notebook, tmp_path, monkeypatch)
