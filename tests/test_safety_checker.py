"""The safety checker and CLIP's pictures beside the reference's: the same pixels, scores, flags and black pictures."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from reference import difference, randomize
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import minidiff
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder

MANIFEST = narrow(read_manifest("stable-diffusion-v1-5"))
RNG = np.random.default_rng(0)


def pictures(count, least=8, most=300):
    """Noise of any size and shape, fine or in large patches: so that scores differ from picture to picture."""
    for i in range(count):
        height, width = RNG.integers(least, most, 2)
        small = RNG.integers(0, 256, (2, 3, 3) if i % 2 else (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(small).resize((int(width), int(height)), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stable Diffusion 1.5 with a checker whose thresholds some random pictures pass."""
    place = tmp_path_factory.mktemp("checker") / "folder"
    make_random_folder(MANIFEST, place, seed=3)
    file = place / "safety_checker/model.safetensors"
    tensors = load_file(file)
    tensors["concept_embeds_weights"] = torch.full((17,), 0.33)
    tensors["special_care_embeds_weights"] = torch.full((3,), 0.2)
    save_file(tensors, file, metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def checkers(folder):
    cls = StableDiffusionSafetyChecker
    return [
        library.from_pretrained(folder / "safety_checker") for library in (minidiff.StableDiffusionSafetyChecker, cls)
    ]


def both(folder, **options):
    pipes = [library.DiffusionPipeline.from_pretrained(folder, **options) for library in (minidiff, diffusers)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


PROCESSORS = [
    {},
    {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},  # of 2022
    {"size": {"shortest_edge": 100}, "crop_size": {"height": 90, "width": 120}},  # pads
    {"size": {"height": 64, "width": 48}, "do_center_crop": False, "resample": 2},
    {"do_rescale": False},
    {"do_normalize": False},
    {"rescale_factor": 0.1, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 0.5]},
]


@pytest.mark.parametrize("values", PROCESSORS, ids=str)
def test_pixels(values, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    ours = minidiff.CLIPImageProcessor.from_pretrained(tmp_path)
    reference = CLIPImageProcessorPil.from_pretrained(tmp_path)
    images = list(pictures(6))
    images += [images[0].convert(mode) for mode in ("L", "RGBA", "P", "1", "CMYK", "LA")]
    mine, theirs = (each(images, return_tensors="pt")["pixel_values"] for each in (ours, reference))
    assert mine.dtype == torch.float32
    assert torch.equal(mine, torch.as_tensor(theirs).float())
    ours.save_pretrained(tmp_path / "saved")
    again = CLIPImageProcessorPil.from_pretrained(tmp_path / "saved")(images, return_tensors="pt")
    assert torch.equal(torch.as_tensor(again.pixel_values).float(), mine)


def test_pixels_of_what_is_no_picture():
    process = minidiff.CLIPImageProcessor()
    for bad in ("picture.png", np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), [None]):
        with pytest.raises(ValueError, match="images must be PIL images"):
            process(bad)
    with pytest.raises(ValueError, match="return_tensors='np'"):
        process(next(pictures(1)), return_tensors="np")
    with pytest.raises(minidiff.ConfigError, match=r"size=.*shortest_edge"):
        minidiff.CLIPImageProcessor(size={"longest_edge": 3})
    with pytest.raises(minidiff.ConfigError, match="image_std"):
        minidiff.CLIPImageProcessor(image_std=(0.0, 1.0, 1.0))


def drawn(count=20):
    """Pictures that the bundled model drew, out of those in README: every second one of their grid."""
    with Image.open(Path(__file__).parents[1] / "notebooks/images/tiny_emoji_samples.png") as grid:
        side = grid.width // 8
        places = [(i % 8 * side, i // 8 * side) for i in range(0, 2 * count, 2)]
        return [grid.convert("RGB").crop((left, top, left + side, top + side)) for left, top in places]


@torch.no_grad()
def test_scores_and_flags_of_200_pictures_and_20_drawn_ones(checkers):
    ours, reference = checkers
    seen = minidiff.CLIPImageProcessor()([*pictures(200), *drawn(20)]).pixel_values
    flags, expected = [], []
    for part in seen.split(55):
        blank = np.ones((len(part), 2, 2, 3))
        flags += ours(part, blank)[1]
        expected += reference(part, list(blank))[1]
        mine = ours.scores(part)
        embeds = reference.visual_projection(reference.vision_model(part)[1])
        special = cosine_distance(embeds, reference.special_care_embeds) - reference.special_care_embeds_weights
        concepts = cosine_distance(embeds, reference.concept_embeds) - reference.concept_embeds_weights
        care = 0.01 * (special.round(decimals=3) > 0).any(1, keepdim=True)
        assert (mine.special - special).abs().max() <= 5.1e-4  # rounded to thousandths
        assert (mine.concepts - concepts - care).abs().max() <= 5.1e-4
        exact = ours.visual_projection(ours.vision(part).pooler_output)
        assert difference(exact, embeds) <= 1e-5
        for kinds in ("concept_embeds", "special_care_embeds"):
            scores = cosine_distance(exact, getattr(ours, kinds))
            assert (scores - cosine_distance(embeds, getattr(reference, kinds))).abs().max() <= 1e-5
    assert flags == expected
    assert len(flags) == 220 and 20 < sum(flags[:200]) < 180 and 0 < sum(flags[200:]) < 20


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray, list])
def test_black_pictures(checkers, kind):
    seen = minidiff.CLIPImageProcessor()(list(pictures(8))).pixel_values
    images = torch.rand(8, 3, 4, 4)
    images = {np.ndarray: images.numpy(), list: list(images.numpy())}.get(kind, images)
    with pytest.warns(UserWarning, match="may not be safe for work"):
        black, flags = checkers[0](seen, images)
    assert 0 < sum(flags) < 8
    for image, before, flag in zip(black, images, flags, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(before) * (not flag))
    with pytest.raises(ValueError, match="images are 3"):
        checkers[0](seen, images[:3])


def test_names_of_both_kinds_and_saves(checkers, tmp_path):
    """transformers 5 saves `vision_model.*`, the Hub has `vision_model.vision_model.*`."""
    ours, reference = checkers
    reference.save_pretrained(tmp_path / "reference")
    file = tmp_path / "reference/model.safetensors"
    tensors = load_file(file)
    short = {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in tensors.items()}
    long = {name.replace("vision_model.", "vision_model.vision_model."): tensor for name, tensor in short.items()}
    for names in (short, long):
        save_file(names, file, metadata={"format": "pt"})
        again = minidiff.StableDiffusionSafetyChecker.from_pretrained(tmp_path / "reference")
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
    ours.save_pretrained(tmp_path / "ours")
    back = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "ours")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
def test_in_a_pipeline(folder, output_type):
    """The picture of a flagged row is black, of the others the same as without."""
    pipes = both(folder)
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "num_images_per_prompt": 4}
    results = [
        pipe("a cat", output_type=output_type, generator=torch.Generator().manual_seed(1), **arguments)
        for pipe in pipes
    ]
    flags = results[0].nsfw_content_detected
    assert flags == results[1].nsfw_content_detected
    assert 0 < sum(flags) < 4
    ours, theirs = ([np.asarray(image, np.float32) for image in result.images] for result in results)
    for mine, expected, flag in zip(ours, theirs, flags, strict=True):
        assert np.abs(mine - expected).max() <= (1 if output_type == "pil" else 1e-4)
        assert mine.any() != flag
    latents = pipes[0]("a cat", output_type="latent", num_inference_steps=1, height=64, width=64)
    assert latents.nsfw_content_detected is None


@pytest.mark.parametrize("name", ["CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorPil"])
def test_all_three_names_are_read(folder, name, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"feature_extractor": ["transformers", name]}))
    pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe.feature_extractor) is minidiff.CLIPImageProcessor
    pipe.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert saved["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert saved["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    reference = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(reference.safety_checker, StableDiffusionSafetyChecker)
    assert isinstance(reference.feature_extractor, CLIPImageProcessorPil)


def test_none_is_honoured_with_a_warning(folder):
    with pytest.warns(UserWarning, match="has no safety checker"):
        pipe = minidiff.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipe.safety_checker is None
    assert type(pipe.feature_extractor) is minidiff.CLIPImageProcessor
    pipe.safety_checker = lambda images, clip_input: (images, [True] * len(images))  # anything that answers so
    images, flags = pipe.run_safety_checker(torch.zeros(2, 3, 8, 8), "cpu", torch.float32)
    assert flags == [True, True] and images.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="safety_checker needs a feature_extractor"):
        minidiff.DiffusionPipeline.from_pretrained(folder, feature_extractor=None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_image_encoder(name, tmp_path):
    config = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config |= {"image_size": 48, "patch_size": 14, "projection_dim": 24, "hidden_act": "gelu"}
    reference = getattr(transformers, name)(transformers.CLIPVisionConfig(**config))
    randomize(reference, 0).save_pretrained(tmp_path / "reference")
    ours = getattr(minidiff, name).from_pretrained(tmp_path / "reference")
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    mine = ours(pixels, output_hidden_states=True)
    theirs = reference(pixels, output_hidden_states=True)
    for key in ("last_hidden_state", "image_embeds" if "Proj" in name else "pooler_output"):
        assert difference(mine[key], theirs[key]) <= 1e-5
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert difference(a, b) <= 1e-5
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(pixels)[0], theirs[0])
    with pytest.raises(ValueError, match="pixel_values has shape"):
        ours(pixels[:, :, :40])
