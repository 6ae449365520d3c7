"""The models in the box: their data, the scripts that train and judge them, and that the reference draws with them."""

import dataclasses
import json
import re
import runpy
import sys

import diffusers
import evaluate_tiny
import judge
import numpy as np
import pytest
import scenes
import small
import sprites
import torch
import torch.nn.functional as F
import train_tiny
from PIL import Image

import minidiff
from minidiff import layers

CALLS = {"tiny-emoji": {"prompt": ["a red apple on a blue background", "panda"]}, "tiny-ddpm": {"batch_size": 2}}
MODELS = list(CALLS)


def test_the_drawings_of_tiny_ddpm_are_all_different_and_lie_on_their_colour():
    assert len(set(sprites.NAMES)) == 160 and set(small.THINGS) < set(scenes.THINGS) < set(sprites.NAMES)
    number, colour = small.trained()
    assert len(number) == small.POOL and number.bincount().min() > 40 and number.max() == 255
    renders = small.render(torch.arange(256), colour[:256])
    assert renders.shape == (256, 3, 32, 32) and renders.min() > -1e-6 and renders.max() < 1 + 1e-6
    corners = renders[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] - colour[:256, :, None]
    assert ((corners.abs().amax(dim=1) < 1e-6).sum(dim=1) >= 2).all()  # the thing reaches into one or two
    on_gray = small.render(torch.arange(256), torch.full((256, 3), 0.5))
    assert evaluate_tiny.distances(on_gray, on_gray).fill_diagonal_(1).min() > 0.03
    one = scenes.scene("owl", style="flat", size="large", colour="blue", height=40.0)
    one.pose[:, :, 0] = 24
    number = torch.tensor([small.THINGS.index("owl") * 16 + scenes.STYLES.index("flat") * 4 + 2])
    blue = torch.tensor([sprites.COLOURS["blue"]]) / 255
    assert torch.allclose(small.render(number, blue), F.avg_pool2d(scenes.render(one), 2), atol=1e-6)


def test_prompts_name_what_is_asked_for_and_nothing_else():
    assert scenes.prompt(["owl"], colour="orange") == "an owl on an orange background"
    assert scenes.prompt(["umbrella"]) == "an umbrella" and scenes.prompt(["unicorn"]) == "a unicorn"
    assert scenes.prompt(["grapes"], "flat") == "flat grapes" and scenes.prompt(["apple"], "inked") == "an inked apple"
    everything = scenes.prompt(["fox"], "inked", "pink", "small", "left")
    assert everything == "a small inked fox on the left on a pink background"
    assert scenes.prompt(["fox", "key"], "glossy", "red", bare=True) == "glossy fox and glossy key, red background"


def test_random_prompts_leave_words_out_and_are_made_of_the_known_ones():
    some = scenes.trained(2000)
    torch.manual_seed(0)
    prompts = scenes.random_prompts(some)
    assert 0.05 < prompts.count("") / len(prompts) < 0.15
    assert {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt)} <= set(scenes.words())
    for words, share in ((scenes.STYLES, 0.54), (["background"], 0.72)):
        having = sum(any(word in prompt.split() for word in words) for prompt in prompts) / len(prompts)
        assert abs(having - share) < 0.05
    longest = scenes.prompts(scenes.trained(5000), "style colour size place")
    tokenizer = train_tiny.train_tokenizer(scenes.words(), 99)
    assert max(len(ids) for ids in tokenizer(longest).input_ids) <= train_tiny.Emoji.length


def test_held_out_scenes_are_never_trained_on():
    colour, corner = scenes.held_out()
    assert colour.sum(dim=1).tolist() == [1] * 80 and corner.sum(dim=(1, 2)).tolist() == [1] * 80
    some = scenes.trained(20_000)
    assert len(some) == 20_000 and scenes.may_be_shown(some).all()
    for kind in evaluate_tiny.UNSEEN:
        unseen = scenes.unseen(kind, 100)
        assert len(unseen) == 100 and not scenes.may_be_shown(unseen).any()
        first, second = unseen.things.T
        assert colour[first, unseen.colour].all() == (kind == "colour")
        assert unseen.alone.all() == (kind != "pair")
        if kind == "pair":
            assert (first % 10 == second % 10).all() and (first != second).all()
        else:
            assert corner[first, unseen.style, unseen.place].all() == (kind == "corner")


def test_scenes_show_their_thing_at_its_place_in_its_size_on_its_colour():
    some = scenes.trained(400, share_alone=1.0)
    pictures = scenes.render(some)
    assert pictures.shape == (400, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    background = torch.tensor(list(sprites.COLOURS.values()))[some.colour][:, :, None, None] / 255
    torch.testing.assert_close(pictures[:, :, :1, :1], background)
    other = scenes.render(dataclasses.replace(some, colour=(some.colour + 1) % 10))
    # Where both colours of background give one picture there is the thing
    ink = (pictures - other).abs().amax(dim=1) < 0.1
    across, down = (torch.where(ink.any(dim=dim), torch.arange(64.0), torch.nan) for dim in (1, 2))
    left, right = across.nan_to_num(99).amin(dim=1), across.nan_to_num(-1).amax(dim=1)
    top, bottom = down.nan_to_num(99).amin(dim=1), down.nan_to_num(-1).amax(dim=1)
    x, side = (left + right + 1) / 2, torch.maximum(right - left, bottom - top) + 1
    x, side = x[ink.any(dim=(1, 2))], side[ink.any(dim=(1, 2))]
    place, size = some.place[ink.any(dim=(1, 2))], some.size[ink.any(dim=(1, 2))]
    assert len(x) > 380
    means = [x[place == number].mean().item() for number in range(3)]
    assert means[0] < 25 and 30 < means[1] < 34 and means[2] > 39
    assert side[size == 0].mean() < 30 and side[size == 1].mean() > 38
    with_two = scenes.render(scenes.unseen("pair", 4))
    assert with_two.shape == (4, 3, 64, 64)


def test_two_seeds_of_a_prompt_differ_in_what_it_leaves_open():
    one, other = scenes.trained(50, seed=1), scenes.trained(50, seed=2)
    assert (one.pose != other.pose).any() and not torch.equal(scenes.render(one), scenes.render(other))
    assert torch.equal(scenes.render(one), scenes.render(scenes.trained(50, seed=1)))
    two = scenes.at_every_height(scenes.trained(1, share_alone=1.0))
    assert len(two.pose[:, 0].unique(dim=0)) == 2 and len(set(scenes.prompts(two))) == 1
    assert torch.dist(*scenes.render(two)) > 1


def test_the_judge_reads_renders_that_it_has_not_seen_and_sees_what_is_wrong():
    reader = judge.load()
    assert min(judge.accuracy(reader, 500).values()) > 0.95
    wanted = scenes.unseen("pair", 100)
    said = judge.read(reader, scenes.render(wanted))
    assert evaluate_tiny.right(said, wanted)["things and colour"] > 0.9
    swapped = dataclasses.replace(wanted, things=wanted.things.flip(1))
    assert evaluate_tiny.right(said, swapped)["things and colour"] == 0
    recoloured = dataclasses.replace(wanted, colour=(wanted.colour + 1) % 10)
    assert evaluate_tiny.right(said, recoloured)["things and colour"] < 0.05
    alone = scenes.unseen("corner", 100)
    said = judge.read(reader, scenes.render(alone))
    moved = dataclasses.replace(alone, place=(alone.place + 1) % 3, style=(alone.style + 1) % 4)
    shares = evaluate_tiny.right(said, moved)
    assert shares["place"] < 0.05 and shares["style"] < 0.05 and shares["size"] > 0.9


def test_copies_of_training_pictures_are_found(monkeypatch):
    """With pictures that are training pictures wherever that is possible, and with ones in any pose."""
    pool, wanted = train_tiny.Emoji().scenes, scenes.trained(60, seed=8, share_alone=1.0)
    keys = {
        tuple(row) for row in torch.cat([pool.pose[:, 0], torch.stack(pool.columns[1:5], 1), pool.things], 1).tolist()
    }

    def is_trained(scene):
        return (*scene.pose[0, 0].tolist(), *(c.item() for c in scene.columns[1:5]), *scene.things[0].tolist()) in keys

    every = [scenes.at_every_height(wanted[i : i + 1]) for i in range(60)]
    trained = [[i for i in range(2) if is_trained(two[i : i + 1])] for two in every]
    copied = scenes.join(*(two[torch.tensor([(seen or [0])[0]])] for two, seen in zip(every, trained, strict=True)))
    monkeypatch.setattr(evaluate_tiny, "draw", lambda *_, seed: scenes.render(copied))
    share, chance = evaluate_tiny.copies(None, 60)
    assert share == pytest.approx(sum(bool(seen) for seen in trained) / 60) and share > 0.6
    assert chance == pytest.approx(sum(len(seen) for seen in trained) / 120) and 0.3 < chance < 0.6
    monkeypatch.setattr(evaluate_tiny, "draw", lambda *_, seed: scenes.render(wanted))
    assert abs(evaluate_tiny.copies(None, 60)[0] - chance) < 0.2


def test_a_picture_surely_shows_a_thing_up_to_half_way_to_another():
    number, colour = torch.tensor([small.THINGS.index("fox") * 16] * 4), torch.tensor([[0.2, 0.4, 0.9]] * 4)
    fox = small.render(number, colour)
    to_each = small.apart(fox[:1])[0][0]
    to_each[number[0] : number[0] + 16] = torch.inf  # other foxes
    away, other = to_each.min(dim=0)
    other = small.render(other[None], small.apart(fox[:1])[1][:, other])
    part = torch.tensor([0.0, 0.45, 0.55, 1.0])
    found, distance, sure = small.nearest(fox.lerp(other, part[:, None, None, None]))
    assert found[:2].tolist() == number[:2].tolist() and found[3] // 16 != number[3] // 16
    assert (distance[:2] <= part[:2] * away + 1e-6).all() and distance[1] > 0.4 * away and distance[3] < 1e-6
    assert sure[[0, 1, 3]].all()
    assert small.nearest(torch.rand(8, 3, 32, 32))[2].sum() == 0


def test_copies_of_tiny_ddpm_s_training_pictures_are_found():
    """But those on one of the ten colours, of which other pictures are the same."""
    for (number, colour), low, high in (
        (small.trained(), 0.9, 1.0),
        (small.draw(small.POOL, seed=1), 0.0, 0.1),
        (small.draw(200, seed=9), 0.4, 0.6),
    ):
        assert low <= small.copied(small.render(number[:200], colour[:200]), number[:200]) <= high


def test_muon_makes_its_update_orthogonal():
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    for x in (matrix, matrix.T):
        values = torch.linalg.svdvals(train_tiny.orthogonal(x))
        assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("slow", [set(), {torch.bfloat16}])
def test_bfloat16_is_for_processors_that_have_it(slow, monkeypatch):
    monkeypatch.setattr(layers, "SLOW", slow)
    with runpy.run_path(train_tiny.__file__)["FASTER"]:
        assert torch.is_autocast_enabled("cpu") == (not slow)


@pytest.mark.parametrize(("model", "stages"), [("tiny-emoji", 3), ("tiny-ddpm", 1)])
def test_training_runs_resumes_and_leaves_a_pipeline(model, stages, tmp_path, monkeypatch):
    def train(steps):
        numbers = ["--steps", *[str(steps)] * stages, "--batch", *["2"] * stages]
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", model, *numbers, *places])
        train_tiny.main()
        checkpoints = [torch.load(file) for file in tmp_path.glob("runs/*/checkpoint.pt")]
        return [(checkpoint["steps"], checkpoint["seconds"]) for checkpoint in checkpoints]

    monkeypatch.setattr(train_tiny, "SHOWN", 2)
    monkeypatch.setattr(train_tiny, "POOL", 8)
    first = train(1)
    assert len(first) == stages and all(steps == 1 for steps, _ in first)
    assert train(1) == first  # complete: nothing is trained again
    assert all(steps == 2 and seconds > before for (steps, seconds), (_, before) in zip(train(2), first, strict=True))
    pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == ("StableDiffusionPipeline" if model == "tiny-emoji" else "DDPMPipeline")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    parts = [part for part in theirs.components.values() if isinstance(part, torch.nn.Module)]
    assert parts and all(part.dtype == torch.float32 for part in parts)  # they work together


@pytest.mark.parametrize("metadata", [True, False])
def test_training_on_pictures_of_ones_own(metadata, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size, colour in (
        ("a red box", (80, 64), "red"),
        ("a red box 2", (64, 64), "red"),
        ("a_sea", (9, 9), "#00f8"),
    ):
        Image.new("RGBA", size, colour).save(folder / f"{name}.png")
    texts = ["a red box", "a red box", "a sea"]
    if metadata:
        texts = ["a box", "Another box, red", "water"]
        lines = [
            {"file_name": f"{name}.png", "text": text}
            for name, text in zip(("a red box", "a red box 2", "a_sea"), texts, strict=True)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = train_tiny.Folder(folder)
    assert data.texts == texts and len(data) == 3 * train_tiny.VIEWS
    assert data.words == (["a", "another", "box", "red", "water"] if metadata else ["a", "box", "red", "sea"])
    colours = data.pictures(torch.tensor([0, 2])).mean(dim=(2, 3))
    torch.testing.assert_close(colours, torch.tensor([[1.0, 0, 0], [119 / 255, 119 / 255, 1]]), atol=0.01, rtol=0)
    assert set(data.prompts(torch.zeros(100, dtype=torch.long))) == {texts[0], ""}
    monkeypatch.setattr(train_tiny, "SHOWN", 2)
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    numbers = ["--steps", "1", "1", "1", "--batch", "2", "2", "2"]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--pictures", str(folder), *numbers, *places])
    train_tiny.main()
    pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe(texts[0], num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
    assert not (tmp_path / "out/known.json").exists()


def test_a_folder_without_pictures_or_prompts_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="there are no pictures in it"):
        train_tiny.Folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png"}')
    with pytest.raises(SystemExit, match="must have file_name and text"):
        train_tiny.Folder(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny-emoji", "--steps", "1"],
        ["tiny-ddpm", "--batch", "1", "2"],
        ["tiny-emojy"],
        ["tiny-ddpm", "--pictures", "x", "--out", "y"],
        ["--pictures", "x"],
    ],
)
def test_training_refuses_what_it_cannot_follow(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main()
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", MODELS)
def test_bundled_folder_is_small_and_says_where_it_comes_from(name):
    folder = minidiff.bundled(name)
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert sum(sizes) <= 16 * 2**20 and max(sizes) <= 12 * 2**20
    card = (folder / "README.md").read_text()
    assert all(licence in card for licence in ("CC BY 4.0", "MIT", "Apache-2.0"))
    assert f"train_tiny.py {name}" in card


@pytest.mark.parametrize("name", MODELS)
def test_bundled_model_draws_the_references_pictures(name):
    """Both load the folder without arguments."""
    pictures = []
    for library in (minidiff, diffusers):
        pipe = library.DiffusionPipeline.from_pretrained(minidiff.bundled(name))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 20, "generator": generator, "output_type": "np"}
        pictures.append(pipe(**CALLS[name], **options).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


def test_bundled_emoji_are_the_ones_asked_for():
    pipe = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji"))
    pipe.set_progress_bar_config(disable=True)
    wanted = scenes.join(scenes.trained(32, seed=7), *(scenes.unseen(kind, 16) for kind in evaluate_tiny.UNSEEN))
    said = judge.read(judge.load(), evaluate_tiny.draw(pipe, scenes.prompts(wanted), evaluate_tiny.USUAL, seed=0))
    assert evaluate_tiny.right(said, wanted)["things and colour"] >= 0.9


def test_bundled_emoji_come_in_every_style_where_none_is_asked_for():
    pipe = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji"))
    pipe.set_progress_bar_config(disable=True)
    pictures = evaluate_tiny.draw(pipe, ["a guitar"] * 32, 1.0, seed=0)
    assert len(judge.read(judge.load(), pictures)["style"].unique()) == 4 and evaluate_tiny.spread(pictures) > 0.1


@pytest.mark.parametrize("sampler", ["DDIM", "PNDM"])
def test_bundled_ddpm_draws_things_in_every_style_and_no_copies(sampler):
    ddpm = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-ddpm"), torch_dtype=torch.float32)
    scheduler = getattr(minidiff, f"{sampler}Scheduler").from_config(ddpm.scheduler.config)
    pipe = getattr(minidiff, f"{sampler}Pipeline")(ddpm.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 50, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    pictures = pipe(batch_size=32, **options).images
    number, distance, sure = small.nearest(pictures)
    assert sure.float().mean() >= evaluate_tiny.LEAST_SURE and distance.mean() <= evaluate_tiny.FARTHEST
    thing, style, place = (column.unique() for column in torch.unravel_index(number, small.SHAPE))
    assert len(thing) >= 10 and len(style) == 4 and len(place) == 4
    assert 0.2 < small.copied(pictures, number) < 0.8  # by chance 0.5, give or take 0.09
