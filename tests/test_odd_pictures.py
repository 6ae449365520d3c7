"""Odd and wrong pictures, masks, networks and shares: the reference's number, or one error that names what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference import twins
from test_pipelines_samplers import IMAGE, MASK, UNET, XL, compare, embeds, sd, xl  # noqa: F401  (fixtures)

import minidiff

RNG = np.random.default_rng(1)
SIZE = {"height": 24, "width": 16}
ALPHA = Image.merge("RGBA", [*IMAGE.split(), MASK])


def uniform(level):
    return Image.new("L", (16, 24), level)


ODD = {
    "no hole": {"mask_image": uniform(0)},
    "all hole": {"mask_image": uniform(255)},
    "gray, which is rounded": {"mask_image": uniform(127)},
    "smaller": {"mask_image": MASK.resize((8, 12))},
    "another shape": {"mask_image": MASK.resize((40, 12))},
    "bits": {"mask_image": MASK.convert("1")},
    "colours": {"mask_image": IMAGE},
    "alpha, which isn't read": {"mask_image": ALPHA},
    "a smaller tensor": {
        "image": torch.from_numpy(RNG.random((1, 3, 24, 16), np.float32)),
        "mask_image": torch.from_numpy(RNG.random((1, 1, 12, 8), np.float32)),
    },
}


@pytest.mark.parametrize("given", ODD.values(), ids=ODD)
def test_odd_masks(sd, xl, given):  # noqa: F811
    for parts, name in ((sd, "StableDiffusionInpaintPipeline"), (xl, "StableDiffusionXLInpaintPipeline")):
        for strength in (0.6, 1.0):
            asked = {"image": IMAGE, **SIZE, "strength": strength, "num_inference_steps": 4} | given
            compare(parts, name, "EulerDiscreteScheduler", **asked)


def pipeline(parts, name, **more):
    options = {} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    return getattr(minidiff, name)(**parts | more, scheduler=minidiff.EulerDiscreteScheduler(), **options)


WRONG = {
    "image": (
        ({"image": None}, "image must be"),
        ({"image": ALPHA}, r'image has shape \(1, 4, 24, 16\).*convert\("RGB"\)'),
        ({"image": MASK}, r'image has shape \(1, 1, 24, 16\).*convert\("RGB"\)'),
        ({"image": "in.png"}, "image must be"),
        ({"image": IMAGE.resize((16, 1))}, "smaller than vae_scale_factor=2"),
        ({"strength": 1.01}, "strength=1.01 must lie in 0..1"),
        ({"strength": -0.5}, "strength=-0.5"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": 0.2}, "strength=0.2 leaves none of 4 steps"),
        ({"strength": None}, "strength must be a number"),
    ),
    "inpaint": (
        ({"mask_image": None}, "image must be"),
        ({"mask_image": torch.zeros(1, 3, 24, 16)}, r"mask_image has shape \(1, 3, 24, 16\) as a tensor"),
        ({"mask_image": torch.zeros(3, 1, 24, 16)}, "image holds 3 for 1 pictures"),
        ({"masked_image_latents": torch.zeros(1, 4, 5, 5)}, "masked_image_latents has shape"),
        ({"mask_image": uniform(0), "padding_mask_crop": 2}, "mask_image is black"),
        ({"padding_mask_crop": -2}, "padding_mask_crop=-2 must be 0 or more"),
        ({"height": 23}, "height=23 must be a positive multiple of"),
        ({"strength": 0.0}, "strength=0.0 leaves none of 4 steps"),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_pictures(sd, xl, kind):  # noqa: F811
    for parts, name in ((sd[0], "StableDiffusion"), (xl[0], "StableDiffusionXL")):
        states = embeds(16, pooled=True) if parts is xl[0] else embeds(8)
        pipe = pipeline(parts, name + {"image": "Img2ImgPipeline", "inpaint": "InpaintPipeline"}[kind])
        base = {"image": IMAGE, "strength": 0.6} | ({"mask_image": MASK, **SIZE} if kind == "inpaint" else {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(minidiff.UNet2DConditionModel, "forward", None)  # nothing is drawn
            for wrong, message in WRONG[kind]:
                with pytest.raises((ValueError, TypeError), match=message):
                    pipe(num_inference_steps=4, **states, **base | wrong)


def test_networks_in_wrong_pipelines(sd, xl):  # noqa: F811
    nine = {kind: twins("UNet2DConditionModel", UNET | more | {"in_channels": 9})[1] for kind, more in KINDS.items()}
    for name in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        with pytest.raises(ValueError, match=f"9 input channels, but {name} takes 4.*StableDiffusionInpaintPipeline"):
            pipeline(sd[0], name, unet=nine["sd"])
    for name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        with pytest.raises(ValueError, match=f"9 input channels, but {name} takes 4.*InpaintPipeline"):
            pipeline(xl[0], name, unet=nine["xl"])
    with pytest.raises(ValueError, match="unet isn't XL's"):
        pipeline(xl[0], "StableDiffusionXLInpaintPipeline", unet=nine["sd"])


KINDS = {"sd": {}, "xl": XL}


def test_a_refiner_alone(xl, tmp_path):  # noqa: F811
    """It draws from a picture, and in no pipeline without one."""
    unet = twins("UNet2DConditionModel", UNET | XL | {"projection_class_embeddings_input_dim": 5 * 4 + 6})[1]
    own = {"unet": unet, "text_encoder": None, "requires_aesthetics_score": True}
    refiner = pipeline(xl[0], "StableDiffusionXLImg2ImgPipeline", **own)
    with pytest.raises((ValueError, TypeError), match="image must be"):
        refiner(**embeds(16, pooled=True), num_inference_steps=2)
    refiner.save_pretrained(tmp_path)
    for load in (minidiff.AutoPipelineForText2Image, minidiff.StableDiffusionXLPipeline):
        with pytest.raises(minidiff.LoadError, match="requires_aesthetics_score is not supported"):
            load.from_pretrained(tmp_path)
    as_base = pipeline(xl[0], "StableDiffusionXLPipeline", unet=unet, text_encoder=None)
    with pytest.raises(ValueError, match="numbers of micro-conditioning"):
        as_base(**embeds(16, pooled=True), **SIZE, num_inference_steps=2)


def test_xl_without_pooled_states(xl):  # noqa: F811
    pipe, states = pipeline(xl[0], "StableDiffusionXLPipeline"), embeds(16, pooled=True)
    for left_out in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        given = {name: value for name, value in states.items() if name != left_out}
        with pytest.raises(ValueError, match=f"was given without {left_out}"):
            pipe(**given, **SIZE, num_inference_steps=2)
