"""The command line, in this process: what it draws, writes and prints."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.__main__ import SCHEDULERS, main


@pytest.fixture
def draw(tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return main(["red apple", "--model", str(tiny_sd_folder), "--steps", "2", "--device", "cpu", *arguments])

    return run


def test_writes_the_picture_that_python_draws(draw, tmp_path, capsys, tiny_sd_folder):
    assert draw("--seed", "7", "--guidance", "3", "--negative", "blue", "-o", "out.png") == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r"out\.png \(16 x 16, [0-9.]+ s a step on cpu\)\n", out)
    pipe = minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3, "negative_prompt": "blue"}
    expected = pipe("red apple", generator=torch.Generator().manual_seed(7), **arguments).images[0]
    with Image.open(tmp_path / "out.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert picture.text == {
            "prompt": "red apple",
            "negative": "blue",
            "model": str(tiny_sd_folder),
            "scheduler": "PNDMScheduler",
            "steps": "2",
            "guidance": "3.0",
            "seed": "7",
            "n": "1",
        }


def test_lora_and_embeddings(draw, tmp_path, tiny_sd_folder, capsys):
    pipe = minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        parameters = minidiff.lora.add(pipe.unet, rank=2, adapter_name=name)
        for parameter in parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator)
        pipe.save_lora_weights(tmp_path, minidiff.lora.state_dict(pipe.unet, name), weight_name=f"{name}.safetensors")
    embedding = {"<new>": torch.randn(2, pipe.text_encoder.config.hidden_size, generator=generator)}
    torch.save(embedding, tmp_path / "new.bin")
    files = ("--lora", "one.safetensors:-0.5", "--lora", "two.safetensors", "--embedding", "new.bin")
    assert draw(*files, "--negative", "<new>") == 0
    pipe.set_adapters(["one", "two"], [-0.5, 1.0])
    pipe.load_textual_inversion(embedding)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "negative_prompt": "<new>"}
    expected = pipe("red apple", generator=generator.manual_seed(0), **options).images[0]
    with Image.open(tmp_path / "minidiff.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert picture.text["lora"] == "['one.safetensors:-0.5', 'two.safetensors']"
        assert picture.text["embedding"] == "['new.bin']"
    assert draw("--lora", "nowhere.safetensors:1") == 1
    assert "error: --lora: nowhere.safetensors: no such file" in capsys.readouterr().err


def test_grid_size_scale_and_scheduler(draw, tmp_path):
    assert draw("-n", "3", "--height", "24", "--width", "16", "--scale", "2", "--scheduler", "ddim") == 0
    with Image.open(tmp_path / "minidiff.png") as grid:
        assert grid.size == (2 * 16 * 2, 2 * 24 * 2)
        assert grid.text["scheduler"] == "DDIMScheduler"
        third = np.asarray(grid)[48::2, :32:2]
        assert np.array_equal(np.asarray(grid)[48:, :32], third.repeat(2, 0).repeat(2, 1))
    assert draw("--seed", "2", "--height", "24", "--width", "16", "--scheduler", "ddim", "-o", "alone.png") == 0
    with Image.open(tmp_path / "alone.png") as alone:  # picture i of a grid has seed + i, within rounding
        assert np.abs(np.asarray(alone).astype(int) - third).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "101"], "--height=101 must be a positive multiple of "),
        (["--steps", "2000"], "--steps=2000 must lie in 1..1000"),
        (["--model", "./nowhere"], "--model: ./nowhere: there is no such folder"),
        (["--model", "file.bin"], "--model: file.bin: "),
        (["--variant", "fp8"], "--model: {model}: no component has weights of the variant 'fp8'"),
        (["--control", "./nowhere", "--control-image", "x"], "--control: ./nowhere: there is no such folder"),
        (["--embedding", "./nowhere.bin"], "--embedding: ./nowhere.bin: "),
        (["--scheduler", "ddim", "--karras"], "--karras: DDIMScheduler has no use_karras_sigmas"),
    ],
)
def test_errors_are_one_line(draw, tmp_path, capsys, arguments, message, tiny_sd_folder):
    """They name the flag."""
    Path("file.bin").write_bytes(b"no weights")
    assert draw(*arguments) == 1
    captured = capsys.readouterr()
    told = captured.err.splitlines()[-1]
    assert told.startswith(f"error: {message.format(model=tiny_sd_folder)}") and captured.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n: 0 must be 1 or more"),
        (["--scale", "0"], "--scale: 0 must lie in 1..64"),
        (["--scale", "1000000"], "--scale: 1000000 must lie in 1..64"),
        (["--steps", "0"], "--steps: 0 must be 1 or more"),
        (["--steps", "2.5"], "--steps: invalid int value: '2.5'"),
        (["--width", "-8"], "--width: -8 must be 1 or more"),
        (["--guidance", "nan"], "--guidance: nan must be finite"),
        (["--guidance", "-inf"], "--guidance: expected one argument"),
        (["--guidance=-inf"], "--guidance: -inf must be finite"),
        (["--image", "x.png", "--strength", "1.5"], "--strength: 1.5 must lie in 0..1"),
        (["--image", "x.png", "--strength", "nan"], "--strength: nan must lie in 0..1"),
        (["--batch", "2"], "--batch: 2 needs --prompts"),
        (["-o", "picture.jpg"], "-o: picture.jpg must be a .png"),
        (["-o", "nowhere/x.png"], "-o: nowhere/x.png must be a .png in a folder that exists"),
        (["--scheduler", "eular"], "--scheduler: invalid choice: 'eular'"),
        (["--seed", str(2**64)], f"--seed: {2**64} must lie in 0..2^64 - 2"),
        (["--seed", "-1"], "--seed: -1 must lie"),
        (["--seed", str(2**64 - 1), "-n", "2"], "must lie in 0..2^64 - 3"),
        *(([flag, ""], f"{flag}: is empty") for flag in ("--model", "--device", "--image", "--lora", "--output")),
        *(
            (["--device", name], f"--device: {name} isn't there; supported here: ")
            for name in ("foo", "cuda:99", "cpu:x")
        ),
        *[(["--device", "cuda"], "--device: cuda isn't there; supported here: cpu")] * (not torch.cuda.is_available()),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(draw, arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        draw(*arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ([], 3),  # PNDM takes a step more
        (["--scheduler", "ddim"], 2),
        (["--scheduler", "ddim", "--image", "in.png", "--strength", "0.5"], 1),
    ],
)
def test_seconds_are_those_of_the_steps_that_ran(draw, capsys, monkeypatch, more, count):
    Image.new("RGB", (16, 16)).save("in.png")
    clock = iter([0.0, 6.0])
    monkeypatch.setattr("minidiff.__main__.time.perf_counter", lambda: next(clock))
    assert draw(*more) == 0
    assert f"{6 / count:.3f} s a step" in capsys.readouterr().out


def test_a_pipeline_without_a_prompt(draw, tiny_ddpm_folder, capsys):
    assert draw("--model", str(tiny_ddpm_folder)) == 1
    assert "a DDPMPipeline takes no prompt" in capsys.readouterr().err


def test_the_bundled_model_draws_what_the_prompt_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["a large red apple in the middle on a blue background"]) == 0
    captured = capsys.readouterr()
    assert "Drawn by the bundled tiny-emoji; a real one: --model" in captured.out
    assert "warning" not in captured.err
    with Image.open("minidiff.png") as picture:
        assert picture.size == (256, 256)
        pixels = np.asarray(picture).astype(int)
    red, green, blue = pixels[4, 4]  # the corner is background
    assert blue > red + 60 and blue > green + 40
    red, green, blue = pixels[118:138, 118:138].mean(axis=(0, 1))  # the middle is apple
    assert red > green + 60 and red > blue + 60


def test_unknown_words_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["a purple platypus", "--steps", "1"]) == 0
    assert "warning: tiny-emoji has never seen the word 'platypus'; --list" in capsys.readouterr().err
    assert main(["a red aple", "--steps", "1"]) == 0
    assert "'aple'; did you mean maple or apple?" in capsys.readouterr().err
    assert main(["a red apple", "--negative", "a foxx", "--steps", "1"]) == 0
    assert "'foxx'; did you mean fox?" in capsys.readouterr().err
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "red apple" in out and '"a fox and a cactus on a yellow background"' in out
    known = json.loads((minidiff.bundled("tiny-emoji") / "known.json").read_text())
    lists = [f"{kind.capitalize()}: {', '.join(those)}" for kind, those in known.items()]
    assert all((line in out) == (not line.startswith("Words")) for line in lists)


def test_the_bundled_model_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["a fox", "--steps", "2", "-o", "default.png"]) == 0
    assert main(["a fox", "--steps", "2", "-o", "named.png", "--model", "tiny-emoji"]) == 0
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "named.png").read_bytes()
    assert capsys.readouterr().out.count("Drawn by the bundled tiny-emoji") == 2


def test_every_sampler_by_its_short_name(draw, tmp_path):
    """The class that the name stands for draws, with the model's betas; --karras is its config's key."""
    for short, (name, keys) in SCHEDULERS.items():
        assert draw("--scheduler", short, "--steps", "4") == 0, short
        with Image.open(tmp_path / "minidiff.png") as picture:
            assert picture.text["scheduler"] == name
        assert keys.keys() <= set(getattr(minidiff, name)().config)
    pictures = {}
    for extra in ([], ["--karras"]):
        assert draw("--scheduler", "euler", "--steps", "4", *extra) == 0
        pictures[len(extra)] = (tmp_path / "minidiff.png").read_bytes()
    assert pictures[0] != pictures[1]


def test_karras_where_there_is_none(draw, tmp_path, capsys):
    assert draw("--scheduler", "ddim", "--karras") == 1
    assert "DDIMScheduler has no use_karras_sigmas" in capsys.readouterr().err


def test_an_output_that_cant_be_written(draw, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        draw("-o", "folder.png")
    assert "folder.png can't be written: it is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "full.png"]


def test_a_picture_is_written_whole_or_not_at_all(draw, tmp_path, capsys, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"old")

    def full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert draw("-o", "old.png") == 1
    assert "error: old.png can't be written: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FloatingPointError("the sample isn't finite after step 1"), "the sample isn't finite after step 1"),
        (MemoryError(), "there is not enough memory"),
    ],
)
def test_a_run_that_overflows_is_one_line(draw, tmp_path, capsys, monkeypatch, error, told):
    def overflow(self, prompt, num_inference_steps=50, guidance_scale=7.5, generator=None):
        raise error

    monkeypatch.setattr(minidiff.StableDiffusionPipeline, "__call__", overflow)
    assert draw() == 1
    assert capsys.readouterr().err == f"error: {told}\n"
