"""Pictures out of pictures beside the reference's: image to image, and inpainting with 4 and 9 channels."""

import diffusers
import numpy as np
import pytest
import torch
from layouts import make_folder
from PIL import Image
from reference import difference

import minidiff

PICTURE = 1e-4  # in [0, 1]
LATENTS = 1e-4  # relative to the largest: random weights clamp most pixels, so every step is compared as well
PROMPT = "a photograph of an astronaut riding a horse"
INPAINTING = {4: "stable-diffusion-v1-5", 9: "stable-diffusion-inpainting"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(height=64, width=64, seed=0, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def mask(height=64, width=64):
    """White in a box with a gray border, which is made black or white."""
    values = np.zeros((height, width), np.uint8)
    values[height // 4 : height // 2, width // 4 : -4] = 255
    values[height // 2 : height // 2 + 3] = 140
    return Image.fromarray(values)


def load(library, folder, name):
    pipe = getattr(library, name).from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("folders")
    return {n: make_folder(repository, place / str(n), seed=n) for n, repository in INPAINTING.items()}


@pytest.fixture(scope="module")
def img2img(folders):
    return [load(library, folders[4], "StableDiffusionImg2ImgPipeline") for library in (minidiff, diffusers)]


@pytest.fixture(scope="module", params=[4, 9], ids="{}ch".format)
def inpaint(request, folders):
    name = "StableDiffusionInpaintPipeline"
    return [load(library, folders[request.param], name) for library in (minidiff, diffusers)]


def draw(pipe, **arguments):
    """The picture, and the latents after every step."""
    steps = []

    def keep(_pipe, _i, _t, tensors):
        steps.append(tensors["latents"])
        return tensors

    seeds = arguments.pop("seeds", 0)
    generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "np"} | arguments
    images = pipe(callback_on_step_end=keep, generator=generator, **arguments).images
    return [np.asarray(image, np.float32) for image in images], torch.stack(steps)


def compare(pipes, **arguments):
    (ours, latents), (expected, expected_latents) = (draw(pipe, **arguments) for pipe in pipes)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert np.isfinite(mine).all()
        assert np.abs(mine - theirs).max() <= (1 if arguments.get("output_type") == "pil" else PICTURE)
    for mine, theirs in zip(latents, expected_latents, strict=True):
        assert difference(mine, theirs) <= LATENTS


def swap(pipes, name):
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)


SCHEDULERS = ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"]
IMAGES = {
    "pil": picture(),
    "odd": picture(75, 50),
    "list": [picture(), picture(seed=1)],
    "numpy": np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32),
    "tensor": torch.rand(1, 3, 64, 40, generator=seeded()),
    "minus": torch.rand(1, 3, 64, 40, generator=seeded()) * 2 - 1,
    "tensors": [torch.rand(3, 64, 64, generator=seeded(i)) for i in range(2)],
    "latents": torch.randn(1, 4, 8, 9, generator=seeded()),
}
IMG2IMG = [
    *({"image": name} for name in IMAGES if name not in ("list", "tensors")),
    {"image": "list", "prompt": [PROMPT, "a cat"], "negative_prompt": ["blurred", "a dog"]},
    {"image": "tensors", "prompt": [PROMPT, "a cat"], "num_images_per_prompt": 2},
    {"image": "pil", "prompt": [PROMPT, "a cat"], "seeds": [1, 2]},
    {"image": "pil", "num_images_per_prompt": 2, "guidance_scale": 1.0},
    {"image": "pil", "strength": 1.0},
    {"image": "pil", "strength": 0.3},
    {"image": "pil", "strength": 0.1},  # one step, of PNDM's one more
]


@pytest.mark.filterwarnings("ignore:image has values below 0")
@pytest.mark.parametrize("arguments", IMG2IMG, ids=lambda arguments: "-".join(map(str, arguments)))
def test_image_to_image(img2img, arguments):
    swap(img2img, "PNDMScheduler")
    compare(img2img, **arguments | {"image": IMAGES[arguments["image"]]})


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("name", SCHEDULERS[1:])
def test_image_to_image_schedulers(img2img, name, strength):
    swap(img2img, name)
    compare(img2img, image=picture(), strength=strength, eta=0.3)


def test_image_to_image_custom_timesteps(img2img):
    swap(img2img, "DDPMScheduler")
    compare(img2img, image=picture(), timesteps=[900, 500, 300, 10], strength=0.5)
    swap(img2img, "PNDMScheduler")


INPAINTS = [
    {"image": picture(), "mask_image": mask()},
    {"image": picture(), "mask_image": mask(), "strength": 0.7},
    {"image": picture(75, 50), "mask_image": mask(75, 50), "height": 72, "width": 40, "strength": 0.5},
    {"image": picture(), "mask_image": mask(), "prompt": [PROMPT, "a cat"], "seeds": [1, 2], "strength": 0.9},
    {"image": [picture(), picture(seed=1)], "mask_image": [mask(), mask()], "prompt": [PROMPT, "a cat"]},
    {"image": picture(), "mask_image": mask(), "num_images_per_prompt": 2, "guidance_scale": 1.0, "strength": 0.8},
    {
        "image": torch.rand(1, 3, 64, 64, generator=seeded()),
        "mask_image": torch.rand(1, 1, 64, 64, generator=seeded(1)),
    },
    {"image": IMAGES["numpy"], "mask_image": np.asarray(mask(), np.float32)[None] / 255, "strength": 0.6},
    {"image": torch.rand(3, 64, 64, generator=seeded()), "mask_image": torch.rand(64, 64, generator=seeded(1)).round()},
    {"image": picture(), "mask_image": mask(), "latents": torch.randn(1, 4, 8, 8, generator=seeded(3))},
    {
        "image": torch.randn(1, 4, 8, 8, generator=seeded(3)),
        "masked_image_latents": torch.randn(1, 4, 8, 8, generator=seeded(4)),
        "mask_image": mask(),
        "strength": 0.6,
    },
    {"image": picture(), "mask_image": Image.new("L", (64, 64))},  # no hole
    {"image": picture(120, 90), "mask_image": mask(120, 90), "padding_mask_crop": 4, "output_type": "pil"},
    {"image": picture(), "mask_image": mask().convert("RGB"), "strength": 0.5},
]


@pytest.mark.parametrize("arguments", INPAINTS, ids=[str(i) for i in range(len(INPAINTS))])
def test_inpaint(inpaint, arguments):
    swap(inpaint, "DDIMScheduler")
    compare(inpaint, **{"height": 64, "width": 64} | arguments)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler"])
def test_inpaint_schedulers(inpaint, name, strength):
    swap(inpaint, name)
    compare(inpaint, image=picture(), mask_image=mask(), height=64, width=64, strength=strength)


def test_inpaint_mends_schedulers_of_2022(inpaint):
    for library, pipe in zip((minidiff, diffusers), inpaint, strict=True):
        mended = type(pipe)(**pipe.components | {"scheduler": library.PNDMScheduler()})
        assert mended.scheduler.config.steps_offset == 1
        assert mended.scheduler.config.skip_prk_steps is True
        kept = type(pipe)(**pipe.components | {"scheduler": library.DDIMScheduler()})
        assert kept.scheduler.config.clip_sample is True  # which inpainting leaves as it is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image must be"),
        ({"image": picture().convert("RGBA").resize((32, 32))}, r'convert\("RGB"\)'),
        ({"image": picture(mode="L")}, r'convert\("RGB"\)'),
        ({"strength": 0.0}, "strength=0.0 leaves none of 4 steps"),
        ({"strength": 1.2}, "strength=1.2 must lie in 0..1"),
        ({"strength": -0.1}, "strength=-0.1"),
        ({"strength": "much"}, "strength must be a number"),
        ({"image": [picture(), picture(seed=1)]}, "image holds 2 for 1 pictures"),
        ({"generator": [seeded(), seeded()]}, "generator has 2 entries for 1 pictures"),
    ],
)
def test_image_to_image_bad_arguments(img2img, arguments, message):
    swap(img2img, "DDIMScheduler")
    with pytest.raises((ValueError, TypeError), match=message):
        img2img[0](**{"prompt": PROMPT, "image": picture(), "num_inference_steps": 4} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": None}, "image must be"),
        ({"mask_image": torch.rand(1, 3, 64, 64)}, "mask_image has shape .* one channel"),
        ({"mask_image": torch.rand(3, 1, 64, 64), "image": torch.rand(2, 3, 64, 64)}, "3 masks for 2 pictures"),
        ({"mask_image": torch.rand(3, 1, 64, 64)}, "image holds 3 for 1 pictures"),
        ({"strength": 0.0}, "leaves none"),
        ({"padding_mask_crop": 8, "mask_image": torch.rand(1, 1, 64, 64)}, "mask_image must be a PIL image"),
        ({"padding_mask_crop": 8, "output_type": "np"}, "output_type='np'"),
        ({"padding_mask_crop": 8, "mask_image": mask(32, 32)}, "they must agree"),
        ({"padding_mask_crop": 8, "mask_image": Image.new("L", (64, 64))}, "mask_image is black"),
        ({"image": torch.randn(1, 4, 4, 4), "masked_image_latents": torch.randn(1, 4, 8, 8)}, "image are latents"),
        ({"masked_image_latents": torch.randn(1, 4, 4, 4)}, "masked_image_latents has shape"),
        ({"height": 50}, "height=50"),
    ],
)
def test_inpaint_bad_arguments(inpaint, arguments, message):
    base = {"prompt": PROMPT, "image": picture(), "mask_image": mask(), "num_inference_steps": 4}
    with pytest.raises((ValueError, TypeError), match=message):
        inpaint[0](**base | {"height": 64, "width": 64} | arguments)


def test_latents_can_not_be_masked(folders):
    pipe = load(minidiff, folders[9], "StableDiffusionInpaintPipeline")
    with pytest.raises(ValueError, match="give masked_image_latents"):
        pipe(PROMPT, torch.randn(1, 4, 8, 8), mask(), height=64, width=64)


def test_nine_channels_are_for_inpainting(folders):
    with pytest.raises(ValueError, match=r"9 input channels.*takes 4.*StableDiffusionInpaintPipeline"):
        load(minidiff, folders[9], "StableDiffusionImg2ImgPipeline")
    assert type(minidiff.DiffusionPipeline.from_pretrained(folders[9], safety_checker=None)).__name__.endswith(
        "InpaintPipeline"
    )


def test_saves(inpaint, tmp_path):
    """Both ways through save_pretrained."""
    ours, reference = inpaint
    swap(inpaint, "DDIMScheduler")
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "reference")
    name = "StableDiffusionInpaintPipeline"
    pair = [load(minidiff, tmp_path / "reference", name), load(diffusers, tmp_path / "ours", name)]
    compare(pair, image=picture(), mask_image=mask(), height=64, width=64, num_inference_steps=2)
