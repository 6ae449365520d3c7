"""The command line with pictures: image to image, inpainting, XL with its refiner, the safety checker, previews."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import make_folder
from PIL import Image
from safetensors.torch import load_file, save_file

import minidiff
import minidiff.command
from minidiff.__main__ import main
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A place of its own with a picture and a mask of it, which is white below."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 4), np.uint8)).save("in.png")
    Image.fromarray(np.repeat(np.uint8([0, 255]), 12)[:, None].repeat(16, 1)).save("mask.png")


@pytest.fixture
def draw(tiny_sd_folder):
    def run(*arguments, steps=4):
        model = () if "--model" in arguments else ("--model", str(tiny_sd_folder))
        return main(["red apple", *model, "--steps", str(steps), "--device", "cpu", *arguments])

    return run


def pixels(file="minidiff.png"):
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_image_to_image_as_python_draws_it(draw, tiny_sd_folder):
    assert draw("--image", "in.png", "--strength", "0.5", "--negative", "blue") == 0
    pipe = minidiff.StableDiffusionImg2ImgPipeline.from_pretrained(tiny_sd_folder)
    given = {"image": Image.open("in.png").convert("RGB"), "strength": 0.5, "negative_prompt": "blue"}
    expected = pipe("red apple", num_inference_steps=4, generator=seeded(), **given).images[0]
    assert np.array_equal(pixels(), np.asarray(expected))
    text = Image.open("minidiff.png").text
    assert (text["image"], text["strength"], text["guidance"]) == ("in.png", "0.5", "7.5")


def test_a_picture_is_made_as_large_as_it_is_asked_for(draw):
    assert draw("--image", "in.png", "--height", "32", "--width", "48", "-n", "2") == 0
    assert pixels().shape == (32, 2 * 48, 3)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        (["--height", "48"], (48, 32)),
        (["--width", "12"], (18, 12)),
        (["--width", "10"], (16, 10)),  # 15 is no multiple of the VAE's 2
        (["--mask", "mask.png"], (24, 16)),
        (["--mask", "mask.png", "--height", "12"], (12, 8)),
        (["--mask", "mask.png", "--height", "12", "--width", "24"], (12, 24)),
    ],
)
def test_a_side_that_isnt_asked_for_keeps_the_shape(draw, asked, size):
    assert draw("--image", "in.png", *asked, steps=2) == 0
    assert pixels().shape == (*size, 3)


def test_inpainting_as_python_draws_it(draw, tiny_sd_folder):
    pictures = ["--image", "in.png", "--mask", "mask.png"]
    assert draw(*pictures, "--strength", "0.7", "--height", "24", "--width", "16", "--guidance", "2") == 0
    pipe = minidiff.StableDiffusionInpaintPipeline.from_pretrained(tiny_sd_folder)
    given = {"image": Image.open("in.png").convert("RGB"), "mask_image": Image.open("mask.png"), "strength": 0.7}
    given |= {"height": 24, "width": 16, "guidance_scale": 2.0, "num_inference_steps": 4}
    expected = pipe("red apple", generator=seeded(), **given).images[0]
    assert np.array_equal(pixels(), np.asarray(expected))
    assert Image.open("minidiff.png").text["mask"] == "mask.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "mask.png"], "argument --mask: needs --image"),
        (["--strength", "0.5"], "argument --strength: needs --image"),
        (["--image", "in.png", "--mask", "mask.png", "--refiner", "x"], "argument --refiner: would change"),
        (["--safety", "--preview", "own"], "argument --preview: shows what --safety might hide"),
    ],
)
def test_flags_that_dont_go_together(draw, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        draw(*arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "--image: image='nowhere.png' is no file here"),
        (["--image", "in.png", "--mask", "nowhere.png"], "--mask: image='nowhere.png' is no file here"),
        (["--image", "in.png", "--strength", "0.2", "--scheduler", "ddim"], "--strength=0.2 leaves none of 4 steps"),
        (["--image", "in.png", "--width", "9"], "--width=9 must be a positive multiple of 2"),
        (["--safety"], "--safety: {model} has no safety checker"),
        (["--refiner", "{model}"], "--refiner: ends what XL began, but {model} has a StableDiffusionPipeline"),
        (["--preview", "./nowhere"], "--preview: ./nowhere: there is no such folder"),
        (["--preview", "wide"], "--preview: wide has 16 latent channels, not 4"),
    ],
)
def test_errors_are_one_line_before_anything_is_drawn(
    draw, tiny_sd_folder, tmp_path, capsys, monkeypatch, arguments, message
):
    widths = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    minidiff.AutoencoderTiny(**widths, latent_channels=16).save_pretrained("wide")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(minidiff.UNet2DConditionModel, "forward", None)  # nothing is drawn
    assert draw(*(argument.format(model=tiny_sd_folder) for argument in arguments)) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.format(model=tiny_sd_folder)) and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_folders_that_want_a_picture_or_take_less(draw, tiny_sd_folder, capsys):
    pipe = minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    minidiff.StableDiffusionInpaintPipeline.from_pipe(pipe).save_pretrained("inpaint")
    minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe).save_pretrained("image")
    parts = {"unet": minidiff.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)}
    parts |= {"scheduler": minidiff.LCMScheduler.from_config(pipe.scheduler.config)}
    minidiff.LatentConsistencyModelPipeline(**pipe.components | parts).save_pretrained("lcm")
    for folder, given, message in (
        ("inpaint", [], "inpaint: a StableDiffusionInpaintPipeline takes a picture: give --image"),
        ("inpaint", ["--image", "in.png"], "inpaint: a StableDiffusionInpaintPipeline takes a picture: give --mask"),
        ("image", [], "image: a StableDiffusionImg2ImgPipeline takes a picture: give --image"),
        ("lcm", ["--negative", "a"], "--negative: a LatentConsistencyModelPipeline takes no negative_prompt"),
    ):
        assert draw("--model", folder, *given) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
    assert draw("--model", "image", "--image", "in.png") == 0
    assert draw("--model", "inpaint", "--image", "in.png", "--mask", "mask.png") == 0


def test_xl_with_its_refiner_as_python_draws_it(draw, tmp_path, monkeypatch):
    """Without --guidance it is XL's own; the refiner has the base model's VAE and second text encoder."""
    base = minidiff.DiffusionPipeline.from_pretrained(make_folder("stable-diffusion-xl-base-1.0", tmp_path / "base"))
    c, wide = base.unet.config, base.text_encoder_2.config
    numbers = wide.projection_dim + 5 * c.addition_time_embed_dim
    unet = {"cross_attention_dim": wide.hidden_size, "projection_class_embeddings_input_dim": numbers}
    parts = base.components | {"unet": minidiff.UNet2DConditionModel.from_config(c, **unet)}
    parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    minidiff.StableDiffusionXLImg2ImgPipeline(**parts).save_pretrained("refiner")
    size = {"height": 64, "width": 48}
    asked = ("--model", "base", "--refiner", "refiner", "--height", "64", "--width", "48", "--scheduler", "ddim")
    assert draw(*asked, steps=5) == 0
    refiner = minidiff.DiffusionPipeline.from_pretrained("refiner")
    for pipe in (base, refiner):
        pipe.scheduler = minidiff.DDIMScheduler.from_config(pipe.scheduler.config)
    generator, run = seeded(), {"num_inference_steps": 5}
    latents = base("red apple", **run, **size, denoising_end=0.8, output_type="latent", generator=generator).images
    expected = refiner("red apple", **run, image=latents, denoising_start=0.8, generator=generator).images[0]
    assert np.array_equal(pixels(), np.asarray(expected))
    text = Image.open("minidiff.png").text
    assert (text["refiner"], text["guidance"]) == ("refiner", "5.0")
    Path("refiner.safetensors").touch()
    load = minidiff.DiffusionPipeline.from_pretrained
    read = lambda file, **given: load(Path(file).stem, **given)  # noqa: E731
    monkeypatch.setattr(minidiff.DiffusionPipeline, "from_single_file", read)
    assert draw(*asked, "--refiner", "refiner.safetensors", "-o", "file.png", steps=5) == 0
    assert np.array_equal(pixels("file.png"), pixels())
    Path("lines.jsonl").write_text('{"prompt": "red", "seed": 1}\n{"prompt": "red apple"}\n')
    many = ("--prompts", "lines.jsonl", "--batch", "2", "-o", "out", "--steps", "5", "--device", "cpu")
    assert main([*asked, *many]) == 0
    assert np.abs(pixels("out/00002.png") - pixels()).max() <= 1


def test_safety(draw, tmp_path, capsys):
    make_random_folder(narrow(read_manifest("stable-diffusion-v1-5")), tmp_path / "sd")
    file = tmp_path / "sd/safety_checker/model.safetensors"
    tensors = load_file(file) | {"concept_embeds_weights": torch.full((17,), -2.0)}  # below any likeness: all black
    save_file(tensors, file, metadata={"format": "pt"})
    asked = ("--model", "sd", "--height", "64", "--width", "64")
    for flag in ([], ["--safety"]):
        assert draw(*asked, *flag, steps=1) == 0
        assert not pixels().any()
    assert "warning: 1 of 1 pictures may not be safe for work" in capsys.readouterr().err
    assert draw(*asked, "--no-safety", steps=1) == 0
    assert pixels().any()
    assert "warning: StableDiffusionPipeline has no safety checker" in capsys.readouterr().err


@pytest.fixture
def previews(monkeypatch):
    """What was written to OUTPUT.preview.png, in order."""
    seen, write = [], minidiff.command.write

    def watch(picture, file, settings=None):
        write(picture, file, settings)
        seen.append(pixels(file))
        assert file.name == "out.preview.png"

    monkeypatch.setattr(minidiff.command, "write", watch)
    return seen


def test_previews_come_near_to_the_picture(previews, tmp_path):
    asked = ("--preview", "own", "--scheduler", "euler", "--steps", "4", "-o", "out.png")
    assert main(["a red apple on a blue background", *asked]) == 0
    first, *_, last = [np.abs(picture - pixels("out.png")).mean() for picture in previews]
    assert len(previews) == 4 and last < 4 and first > 20
    assert not (tmp_path / "out.preview.png").exists()


@pytest.mark.parametrize("variant", (None, "fp16"))
def test_previews_by_a_tiny_vae(draw, previews, tiny_sd_folder, variant):
    """In its own size, the pictures in a grid."""
    widths = {"encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3}
    few = {"num_encoder_blocks": [1] * 3, "num_decoder_blocks": [1] * 3}
    minidiff.AutoencoderTiny(**widths, **few).save_pretrained("tiny", variant=variant)
    minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder).save_pretrained("sd", variant=variant)
    asked = ["--model", "sd", *(["--variant", variant] if variant else [])]
    assert draw(*asked, "--preview", "tiny", "-o", "out.png", "-n", "2", steps=2) == 0
    assert [picture.shape for picture in previews] == [(32, 64, 3)] * 3  # PNDM takes a step more


def test_previews_where_there_are_none(draw, tmp_path, capsys):
    make_folder("ldm-text2im-large-256", tmp_path / "ldm")
    assert draw("--model", "ldm", "--preview", "own") == 1
    told = "error: --preview: a LDMTextToImagePipeline takes no callback_on_step_end\n"
    assert capsys.readouterr().err == told


def test_a_file_of_ones_own_where_the_preview_would_be(draw, capsys):
    Path("out.preview.png").write_bytes(b"my own")
    with pytest.raises(SystemExit):
        draw("--preview", "own", "-o", "out.png")
    assert "argument --preview: out.preview.png is there: move it away" in capsys.readouterr().err
    assert Path("out.preview.png").read_bytes() == b"my own"


def test_a_picture_that_is_too_large_for_pil(draw, capsys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2 - 1)
    assert draw("--image", "in.png") == 1
    assert (
        "error: --image: in.png: not a picture that PIL can read: Image size (384 pixels) exceeds"
        in capsys.readouterr().err
    )


def test_the_bundled_model_begins_with_a_picture(capsys):
    """A red apple on blue becomes a frog: on the same blue; and anew in a part, with the rest as it was."""
    assert main(["a large red apple in the middle on a blue background", "-o", "red.png"]) == 0  # 256 x 256
    assert main(["a large frog in the middle on a blue background", "--image", "red.png", "--strength", "0.7"]) == 0
    red, green = pixels("red.png"), pixels()
    assert green.shape == red.shape == (256, 256, 3)
    assert np.abs(green[4, 4] - red[4, 4]).max() < 40
    middle = green[118:138, 118:138].mean(axis=(0, 1))
    assert middle[1] > middle[0] + 20 and middle[1] > middle[2] + 20
    hole = np.zeros((64, 64), np.uint8)
    hole[:, 32:] = 255
    Image.fromarray(hole).save("right.png")
    assert main(["a large frog in the middle on a blue background", "--image", "red.png", "--mask", "right.png"]) == 0
    part = np.abs(pixels() - red).mean(axis=-1)
    assert part[:, :96].mean() < 12 < part[:, 160:].mean()
    assert capsys.readouterr().out.count("Drawn by the bundled tiny-emoji") == 3
