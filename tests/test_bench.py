"""`python -m weights_compat.bench` measures both sides in processes of their own, and says what it was given wrong."""

import json
import mmap
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from weights_compat import bench
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder
from weights_compat.sides import Inputs, Side
from weights_compat.sweep import exponent

MEMORY = [
    "load the pipeline, MB",
    "picture, MB beyond weights",
    "VAE, twice the size, MB",
    "VAE, in tiles, 4 times, MB",
]
MEMORY = MEMORY if bench.PROCESS.exists() else []


def test_prints_a_row_for_each_part(tiny_sd_folder, capsys):
    assert bench.main([str(tiny_sd_folder), "--steps", "4", "--turns", "1", "--large", "--optimize"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.{30}) \| +([\d.,]+) \| +([\d.,]+) \| +([\d.]*) \|$", out, re.MULTILINE)
    assert [row[0].strip() for row in rows] == [
        "import",
        "from the start to a picture",
        "load the pipeline",
        "picture",
        "text encoder, batch of 2",
        "UNet, batch of 2",
        "VAE, decode one picture",
        *MEMORY,
    ]
    for _, reference, ours, ratio in rows:
        reference, ours = (float(number.replace(",", "")) for number in (reference, ours))
        assert ours / reference == pytest.approx(float(ratio), rel=0.02, abs=0.01) if ratio else not reference


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "argument NAME: ./nowhere: there is no such folder"),
        ([".", "--turns", "0"], "argument --turns: 0 is less than 1"),
        ([".", "--steps", "-1"], "argument --steps: -1 is less than 1"),
    ],
)
def test_refuses_what_it_cannot_run(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_says_which_side_failed(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(RuntimeError, match="minidiff failed:\n"):
        bench.turn("minidiff", [str(tmp_path)])


def test_measures_pipelines_without_words_too(tiny_ddpm_folder):
    assert list(bench.turn("minidiff", [str(tiny_ddpm_folder), "--steps", "2"])) == [
        "import",
        "from the start to a picture",
        "load the pipeline",
        "picture",
        "UNet, batch of 2",
        *MEMORY[:2],
        "UNet, operations of torch",
    ]


VAE = "VAE, decode one picture"


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "stable-diffusion-xl-base-1.0": ["text encoder, batch of 2", "text encoder 2, batch of 2", VAE],
        "stable-diffusion-x4-upscaler": ["text encoder, batch of 2", VAE],
        "ldm-text2im-large-256": ["bert, batch of 2", VAE],
    }.items(),
)
def test_measures_what_a_system_has(name, parts, tmp_path):
    make_random_folder(narrow(read_manifest(name)), tmp_path)
    side = Side(False, tmp_path, json.loads((tmp_path / "model_index.json").read_text()), "cpu", torch.float32)
    rows = bench.measure(side, Inputs("cpu", torch.float32, steps=2, seed=0))
    both = {"load the pipeline", "picture", "UNet, batch of 2", "UNet, operations of torch", *MEMORY[:2]}
    assert set(rows) == {*both, *parts} and min(rows.values()) >= 0


def test_memory_is_what_a_call_takes_at_once():
    """Of 64 MB that go and 32 MB that stay; Linux counts resident pages, not to the last one."""
    kept = []

    def written(size: int) -> mmap.mmap:  # malloc might give what it kept of calls before
        memory = mmap.mmap(-1, size)
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))
        return memory

    def call():
        written(64_000_000).close()
        kept.append(written(32_000_000))

    watch = bench.Watch("cpu")
    for loads, expected in {False: 32, True: 64}.items():
        rows = watch.memory("row", call, loads)
        assert not bench.PROCESS.exists() or rows["row"] == pytest.approx(expected, abs=2)


def test_sweep_states_and_draws_the_powers(tiny_sd_folder, tmp_path, capsys):
    assert bench.main([str(tiny_sd_folder), "--sweep", str(tmp_path / "powers.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "pixels of latents (pass of 1)",
        "pictures at once (pass)",
        "steps (whole call)",
    ]
    assert Image.open(tmp_path / "powers.png").size[0] > 1000


def test_sweep_of_a_pipeline_without_words(tiny_ddpm_folder, tmp_path):
    assert bench.main([str(tiny_ddpm_folder), "--sweep", str(tmp_path / "powers.png")]) == 0


@given(st.floats(0.1, 3), st.floats(1e-3, 1e3))
def test_the_power_is_the_exact_one(p, c):
    assert exponent([(x, c * x**p) for x in (1, 2, 4, 8)]) == pytest.approx(p)
