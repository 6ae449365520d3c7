"""`python -m weights_compat.verify` passes on every family, and fails where something is broken, at the right stage."""

import json
import re

import pytest
import torch

import minidiff
from weights_compat import stages, verify
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder
from weights_compat.sides import Inputs, Side


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "sd15"
    make_random_folder(narrow(read_manifest("stable-diffusion-v1-5")), path)
    return path


@pytest.fixture(scope="module")
def parts(folder):
    """The same folder without a pipeline that minidiff has, so that the picture, the slowest stage, is left out."""
    path = folder.with_name("parts")
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    index = json.loads((folder / "model_index.json").read_text())
    (path / "model_index.json").unlink()
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "SomePipeline"}))
    return path


@pytest.fixture
def run(capsys):
    """Calls the command and returns its exit code and the verdict of each stage."""

    def call(*arguments):
        code = verify.main([*map(str, arguments), "--steps", "2"])
        out = capsys.readouterr().out
        rows = re.finditer(r"^(.{52}) *(?:nan|[\d.e+-]+) .* (PASS|FAIL)\b", out, re.MULTILINE)
        return code, {row[1].strip(): row[2] for row in rows}, out

    return call


STAGES = {
    "stable-diffusion-v1-5": 18,
    "stable-diffusion-2-1": 16,
    "stable-diffusion-inpainting": 18,
    "stable-diffusion-2-inpainting": 16,
    "stable-diffusion-xl-base-1.0": 20,
    "stable-diffusion-xl-refiner-1.0": 15,
    "stable-diffusion-xl-1.0-inpainting-0.1": 20,
    "stable-diffusion-x4-upscaler": 17,
    "instruct-pix2pix": 18,
    "ldm-celebahq-256": 8,
    "ldm-text2im-large-256": 13,
    "ncsnpp-celebahq-256": 7,
    "ddpm-butterflies-128": 9,
}


@pytest.mark.parametrize("name", STAGES)
def test_every_family_passes(name, run):
    code, verdicts, out = run(name, "--random", "--small", "--seed", 5)
    assert code == 0, out
    assert len(verdicts) == STAGES[name] and set(verdicts.values()) == {"PASS"}
    assert out.startswith(f"versions  minidiff {minidiff.__version__}, diffusers 0.42") and name in out


def failing(verdicts):
    return {stage.split(":")[0] for stage, verdict in verdicts.items() if verdict == "FAIL"}


def swap(monkeypatch, cls_name, one, other):
    """Loads two of a model's tensors into each other's place."""
    from minidiff.loading import model

    read = model.read_weights

    def swapped(folder, files, table, shapes, owner):
        tensors = read(folder, files, table, shapes, owner)
        if owner == cls_name:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        return tensors

    monkeypatch.setattr(model, "read_weights", swapped)


PICTURE = "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("cls", "one", "other", "stage"),
    [
        ("CLIPTextModel", "layers.1.norm1.bias", "layers.1.norm2.bias", "text_encoder"),
        ("UNet2DConditionModel", "mid.resnets.0.norm1.weight", "mid.resnets.1.norm1.weight", "unet"),
        ("AutoencoderKL", "decoder.mid.attentions.0.v.bias", "decoder.mid.attentions.0.out.bias", "vae"),
    ],
)
def test_two_tensors_swapped_fail_at_their_stage(cls, one, other, stage, parts, run, monkeypatch):
    swap(monkeypatch, cls, one, other)
    code, verdicts, out = run(parts)
    assert code == 1 and failing(verdicts) == {stage}, out
    assert re.search(rf"of 15 PASS; FAIL: {stage}", out.splitlines()[-1])


def test_half_precision_has_looser_bounds_that_still_tell_a_gross_mistake(run, monkeypatch):
    arguments = ("ddpm-cifar10-32", "--random", "--dtype", "bfloat16")
    code, verdicts, out = run(*arguments)
    assert code == 0 and re.search(r"^unet .* 4e-02  PASS$", out, re.MULTILINE), out
    assert out.count("left out: the reference's can't draw in bfloat16") == 3
    swap(monkeypatch, "UNet2DModel", "up.3.resnets.1.conv2.weight", "up.3.resnets.2.conv2.weight")
    code, verdicts, out = run(*arguments)
    assert code == 1 and failing(verdicts) == {"unet"}, out


def test_a_norms_eps_fails_at_the_unet(parts, run, monkeypatch):
    config = minidiff.models.unet.UNet2DConditionConfig
    read = config.read.__func__
    monkeypatch.setattr(
        config, "read", classmethod(lambda cls, values, where=None: read(cls, {**values, "norm_eps": 1e-3}, where))
    )
    code, verdicts, out = run(parts)
    assert code == 1 and failing(verdicts) == {"unet"}, out


def test_another_schedule_fails_at_the_scheduler(parts, run, monkeypatch):
    monkeypatch.setattr("minidiff.schedulers.base.make_betas", lambda config: torch.linspace(0.00085, 0.012, 1000))
    code, verdicts, out = run(parts)
    assert code == 1 and failing(verdicts) == {"scheduler"}, out


def test_another_word_fails_at_the_tokenizer(parts, run, monkeypatch):
    call = minidiff.CLIPTokenizer.__call__

    def without_exclamation_marks(self, texts, **options):
        return call(self, [text.strip("!") for text in texts], **options)

    monkeypatch.setattr(minidiff.CLIPTokenizer, "__call__", without_exclamation_marks)
    code, verdicts, out = run(parts)
    assert code == 1 and failing(verdicts) == {"tokenizer"}, out  # the text encoder has the reference's ids


def test_a_mistake_in_the_loop_alone_fails_at_the_picture(folder, run, monkeypatch):
    monkeypatch.setattr("minidiff.pipelines.denoise.guide", lambda uncond, text, scale, *_: text)
    code, verdicts, out = run(folder)
    assert code == 1 and failing(verdicts) == {PICTURE}, out


@pytest.mark.parametrize(("wrong", "stage"), [(0.9, "cut to [0, 1], plus 1"), (1.0, None)])
def test_a_picture_of_score_sde_is_told_from_thousands(wrong, stage, run, monkeypatch):
    finish = minidiff.ScoreSdeVePipeline.finish
    monkeypatch.setattr(
        minidiff.ScoreSdeVePipeline, "finish", lambda self, pictures, *args: finish(self, wrong * pictures, *args)
    )
    _, verdicts, out = run("ncsnpp-celebahq-256", "--random", "--sample", 64)
    found = [name for name, verdict in verdicts.items() if verdict == "FAIL"]
    assert found == ([f"ScoreSdeVePipeline: {stage}"] if stage else []), out


def test_samples_of_another_size(run, tmp_path):
    """The folder says the size, and so the pictures have it too."""
    code, _, out = run("stable-diffusion-inpainting", "--random", "--sample", 8, "--keep", tmp_path / "kept")
    assert code == 0, out
    sizes = [json.loads((tmp_path / "kept" / name / "config.json").read_text()) for name in ("unet", "vae")]
    assert [config["sample_size"] for config in sizes] == [8, 64]


def test_texts_are_read_and_forgotten_before_the_network_is_asked(folder):
    """At full size memory then holds the larger of the two."""
    side = Side(False, folder, json.loads((folder / "model_index.json").read_text()), "cpu", torch.float32)
    pipe = side.pipeline()
    stages.draw(pipe, Inputs("cpu", torch.float32, steps=1, seed=0))
    assert (pipe.text_encoder.device.type, pipe.unet.device.type) == ("meta", "cpu")


def test_what_has_no_stage_is_said(tmp_path, run):
    make_random_folder(narrow(read_manifest("stable-diffusion-v1-5")), tmp_path / "sd")
    file = tmp_path / "sd" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({"_class_name": "SomePipeline", "unet": ["diffusers", "SomeModel"], "x": index["vae"]}))
    (tmp_path / "sd" / "vae").rename(tmp_path / "sd" / "x")
    code, verdicts, out = run(tmp_path / "sd")
    assert code == 0 and set(verdicts) == {f"x: {label}" for label in VAE}
    assert re.search(r"^unet +left out: minidiff has no SomeModel$", out, re.MULTILINE)
    assert "left out: minidiff has no SomePipeline" in out


VAE = ("encode, mean", "encode, log variance", "encode, sampled", "decode")


def test_nan_on_both_sides_is_no_agreement():
    nan = [torch.tensor([1.0, float("nan")])]
    assert not verify.compare("x", 1.0, nan, nan).passed
    assert not verify.compare("x", 1.0, [torch.zeros(2)], [torch.tensor([float("inf"), 0])]).passed


def test_compare_takes_the_worst_pair_and_its_own_scale():
    expected = [torch.tensor([100.0, 0]), torch.tensor([1.0, 0]), torch.zeros(2)]
    actual = [torch.tensor([101.0, 0]), torch.tensor([1.0, 0.5]), torch.zeros(2)]
    result = verify.compare("x", 0.4, expected, actual)
    assert (result.difference, result.relative, result.passed) == (0.5, 0.5, False)
    assert verify.compare("x", 0.4, expected[:1], actual[:1]).passed
    assert not verify.compare("x", 0.4, expected[:2], actual[:1]).passed  # a tensor too few
    assert not verify.compare("x", 0.4, [torch.zeros(2)], [torch.ones(2)]).passed


def test_a_side_that_raises_fails_its_stage_and_the_others_run(parts, run, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(minidiff.AutoencoderKL, "encode", broken)
    code, verdicts, out = run(parts)
    assert code == 1 and "minidiff: RuntimeError: broken on purpose" in out
    assert verdicts["unet"] == verdicts["scheduler: timesteps"] == "PASS"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["stable-diffusion-9", "--random"],
        ["./no/such/parts"],
        ["stable-diffusion-v1-5", "--random", "--small", "--full"],
        ["stable-diffusion-v1-5", "--small"],
        ["stable-diffusion-v1-5", "--random", "--steps", "0"],
        ["stable-diffusion-v1-5", "--random", "--sample", "0"],
        ["stable-diffusion-v1-5", "--sample", "8"],
        ["stable-diffusion-v1-5", "--random", "--dtype", "int8"],
        ["stable-diffusion-v1-5", "--random", "--device", "abacus"],
    ],
)
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        verify.main(arguments)
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_keep_leaves_the_folder_for_another_run(tmp_path, run):
    kept = tmp_path / "kept"
    code, _, out = run("ddpm-cifar10-32", "--random", "--keep", kept)
    assert code == 0, out
    assert json.loads((kept / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    assert isinstance(minidiff.DiffusionPipeline.from_pretrained(kept), minidiff.DDPMPipeline)
    with pytest.raises(SystemExit):
        verify.main(["ddpm-cifar10-32", "--random", "--keep", str(kept)])
