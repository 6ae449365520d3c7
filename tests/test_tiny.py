"""The models in the box: their data, the scripts that train and judge them, and that the reference draws with them."""

import sys

import diffusers
import evaluate_tiny
import numpy as np
import pytest
import sprites
import torch
import train_tiny

import minidiff

CALLS = {"tiny-emoji": {"prompt": ["a red apple on a blue background", "panda"]}, "tiny-ddpm": {"batch_size": 2}}
MODELS = list(CALLS)


def test_every_emoji_and_every_colour_is_shown_and_held_out():
    assert len(set(sprites.NAMES)) == 160
    held_out = sprites.held_out()
    assert held_out.sum(dim=1).tolist() == [1] * 160 and held_out.sum(dim=0).tolist() == [16] * 10
    assert torch.equal(held_out, sprites.held_out())


def test_renders_are_all_different_and_lie_on_their_colour():
    renders = sprites.renders()
    assert renders.shape == (160, 10, 3, 64, 64) and renders.dtype == torch.uint8
    assert (renders[:, :, :, 0, 0] == torch.tensor(list(sprites.COLOURS.values()), dtype=torch.uint8)).all()
    small = sprites.renders(32).flatten(0, 1).flatten(1) / 255
    distances = torch.cdist(small, small) / small.shape[1] ** 0.5
    assert distances.fill_diagonal_(1).min() > 0.03


def test_prompts_have_their_articles():
    assert sprites.prompts("owl", "orange")[0] == "an owl on an orange background"
    assert sprites.prompts("unicorn", "blue")[:3] == [
        "a unicorn on a blue background",
        "unicorn, blue background",
        "a unicorn",
    ]
    assert sprites.prompts("grapes", "red")[2] == "grapes"


def test_duets_show_what_may_be_shown_side_by_side():
    held_out, emoji = sprites.held_out(), torch.arange(160) % 10
    for unseen in (False, True):
        left, right, colour = scenes = sprites.duets(unseen=unseen).T
        assert (left != right).all() and ((emoji[left] == emoji[right]) == unseen).all()
        assert not held_out[left, colour].any() and not held_out[right, colour].any()
        assert all(len(one.unique()) == 160 for one in (left, right))
    picture = sprites.render(scenes.T[:1])
    assert picture.shape == (1, 3, 64, 64)
    assert torch.equal(picture[0, :, 16:48, :32], sprites.renders(32)[left[0], colour[0]])
    assert torch.equal(picture[0, :, 16:48, 32:], sprites.renders(32)[right[0], colour[0]])
    assert (picture[0, :, [0, 15, 48, 63]] == picture[0, :, :1, :1]).all()
    assert sprites.scene_prompts(scenes.T[0].tolist()) == [
        "a fox and a bat on a white background",
        "fox and bat, white background",
        "a fox and a bat",
        "fox and bat",
    ]


def test_scenes_with_one_emoji_are_the_renders():
    held_out = sprites.held_out()
    scenes = sprites.alone(held_out)
    assert torch.equal(sprites.render(scenes), sprites.renders()[held_out])
    asked = [sprites.scene_prompts(scene) for scene in scenes.tolist()]
    assert asked == [sprites.prompts(*pair) for pair in sprites.pairs(held_out)]


def test_the_judge_finds_the_scene_under_noise_and_misses_a_wrong_one():
    alone, duets = sprites.alone(sprites.held_out()), sprites.duets(unseen=True)[::300]
    scenes = torch.cat([alone, duets])
    noise = torch.randn(len(scenes), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = sprites.render(scenes) / 255 + 0.1 * noise
    assert torch.equal(evaluate_tiny.nearest_scene(noisy), scenes)
    index, distance, _ = evaluate_tiny.nearest(noisy[:160])
    assert torch.equal(index, alone[:, 0] * 10 + alone[:, 2])
    assert torch.allclose(distance, torch.full((160,), 0.1), atol=0.005)
    other_colour = torch.cat([scenes[:, :2], (scenes[:, 2:] + 1) % 10], dim=1)
    other_order = duets[:, [1, 0, 2]]
    assert (evaluate_tiny.nearest_scene(sprites.render(other_colour) / 255) != scenes).any(dim=1).all()
    assert (evaluate_tiny.nearest_scene(sprites.render(other_order) / 255) != duets).any(dim=1).all()


def test_a_picture_is_surely_an_emoji_up_to_half_way_to_another():
    fox = sprites.renders(32)[sprites.NAMES.index("fox"), 0][None] / 255
    renders = sprites.renders(32)[:, 0] / 255
    apart = evaluate_tiny.distances(fox, renders)[0]
    other = renders[apart.topk(2, largest=False).indices[1]]
    index, distance, sure = evaluate_tiny.nearest(torch.cat([fox.lerp(other, part) for part in (0.0, 0.45, 0.55, 1.0)]))
    assert index[0] == index[1] != index[2] == index[3]
    half = 0.45 * apart.sort().values[1].item()
    assert torch.allclose(distance, torch.tensor([0.0, half, half, 0.0]), atol=1e-3)
    assert sure[[0, 1, 3]].all()


def test_muon_makes_its_update_orthogonal():
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    for x in (matrix, matrix.T):
        values = torch.linalg.svdvals(train_tiny.orthogonal(x))
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_posterior_is_bayes_rule():
    pictures, noisy = (torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 2))
    alpha_bar = torch.tensor([0.03, 0.4])
    found = train_tiny.posterior(noisy, alpha_bar, pictures)
    for x, a, row in zip(noisy.double(), alpha_bar.double(), found, strict=True):
        likelihood = torch.distributions.Normal(a.sqrt() * pictures.double(), (1 - a).sqrt()).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(row.double(), likelihood.softmax(dim=0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("model", "stages"), [("tiny-emoji", 3), ("tiny-ddpm", 1)])
def test_training_runs_resumes_and_leaves_a_pipeline(model, stages, tmp_path, monkeypatch):
    def train(steps):
        numbers = ["--steps", *[str(steps)] * stages, "--batch", *["2"] * stages]
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", model, *numbers, *places])
        train_tiny.main()
        checkpoints = [torch.load(file) for file in tmp_path.glob("runs/*/checkpoint.pt")]
        return [(checkpoint["steps"], checkpoint["seconds"]) for checkpoint in checkpoints]

    few = torch.arange(1600).view(160, 10) >= 120  # 12 emoji: two have a number that ends as another's does
    monkeypatch.setattr(sprites, "held_out", lambda: few)
    monkeypatch.setattr(train_tiny, "SHOWN", 2)
    monkeypatch.setattr(train_tiny, "DUETS", 4)
    first = train(1)
    assert len(first) == stages and all(steps == 1 for steps, _ in first)
    assert train(1) == first  # complete: nothing is trained again
    assert all(steps == 2 and seconds > before for (steps, seconds), (_, before) in zip(train(2), first, strict=True))
    pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe).__name__ == ("StableDiffusionPipeline" if model == "tiny-emoji" else "DDPMPipeline")


@pytest.mark.parametrize(
    "arguments", [["tiny-emoji", "--steps", "1"], ["tiny-ddpm", "--batch", "1", "2"], ["tiny-emojy"]]
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
    assert "Noto Color Emoji" in card and "SIL Open Font License" in card and f"train_tiny.py {name}" in card


@pytest.mark.parametrize("name", MODELS)
def test_bundled_model_draws_the_references_pictures(name):
    pictures = []
    for library in (minidiff, diffusers):
        pipe = library.DiffusionPipeline.from_pretrained(minidiff.bundled(name), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 20, "generator": generator, "output_type": "np"}
        pictures.append(pipe(**CALLS[name], **options).images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


def test_bundled_emoji_are_the_ones_asked_for():
    pipe = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    duets = sprites.duets(unseen=True)
    some = torch.cat([sprites.alone(sprites.held_out())[::20], duets[:: len(duets) // 8][:8]])
    for guidance_scale in (evaluate_tiny.USUAL, evaluate_tiny.GUIDANCE):
        assert evaluate_tiny.share_right(pipe, some, guidance_scale) >= 15 / 16


@pytest.mark.parametrize("sampler", ["DDIM", "PNDM"])
def test_bundled_ddpm_draws_what_lies_near_the_renders(sampler):
    """Each nearer to one emoji than half the way to any other, on a background of the ten colours."""
    ddpm = minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-ddpm"), torch_dtype=torch.float32)
    scheduler = getattr(minidiff, f"{sampler}Scheduler").from_config(ddpm.scheduler.config)
    pipe = getattr(minidiff, f"{sampler}Pipeline")(ddpm.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 50, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    pictures = pipe(batch_size=16, **options).images
    _, distance, sure = evaluate_tiny.nearest(pictures)
    assert distance.mean() <= evaluate_tiny.FARTHEST and sure.float().mean() >= evaluate_tiny.LEAST_SURE
    colours = torch.tensor(list(sprites.COLOURS.values())) / 255
    corners = pictures[:, :, :2, :2].mean(dim=(2, 3))
    assert torch.cdist(corners, colours).min(dim=1).values.median() < 0.05
