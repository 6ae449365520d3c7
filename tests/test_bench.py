"""`python -m weights_compat.bench` measures both sides in processes of their own, and says what it was given wrong."""

import json
import re

import pytest
import torch

from weights_compat import bench
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder
from weights_compat.sides import Inputs, Side


def test_prints_a_row_for_each_part(tiny_sd_folder, capsys):
    assert bench.main([str(tiny_sd_folder), "--steps", "4", "--turns", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.{30}) \| +([\d.,]+) \| +([\d.,]+) \| +([\d.]+) \|$", out, re.MULTILINE)
    assert [row[0].strip() for row in rows] == [
        "import",
        "load the pipeline",
        "text encoder, batch of 2",
        "UNet, batch of 2",
        "VAE, decode one picture",
        "picture, 4 steps",
        "peak memory, MB",
    ]
    for _, reference, ours, ratio in rows:
        reference, ours = (float(number.replace(",", "")) for number in (reference, ours))
        assert ours / reference == pytest.approx(float(ratio), rel=0.02, abs=0.01)


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
        "load the pipeline",
        "UNet, batch of 2",
        "picture, 2 steps",
        "peak memory, MB",
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
    both = {"load the pipeline", "UNet, batch of 2", "picture, 2 steps", "peak memory, MB"}
    assert set(rows) == {*both, *parts} and min(rows.values()) > 0
