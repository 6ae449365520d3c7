"""VaeImageProcessor beside the reference's: equal bits, for every kind of picture and every switch."""

import warnings

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor as Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minidiff.image_processor import VaeImageProcessor

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")


def picture(mode="RGB", width=37, height=29, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    return image.convert("I").convert("I;16") if mode == "I;16" else image.convert("L" if mode == "LA" else mode)


def both(call, **settings):
    """What ours and the reference's make of one call: a tensor, an array, pictures, or an exception."""
    results = []
    for kind in (VaeImageProcessor, Reference):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(call(kind(**settings)))
    return results


def same(ours, reference):
    if isinstance(reference, list):
        return len(ours) == len(reference) and all(same(a, b) for a, b in zip(ours, reference, strict=True))
    if isinstance(reference, Image.Image):
        return ours.mode == reference.mode and ours.size == reference.size and ours.tobytes() == reference.tobytes()
    if isinstance(reference, np.ndarray):
        return ours.dtype == reference.dtype and np.array_equal(ours, reference)
    if isinstance(reference, torch.Tensor):
        return ours.dtype == reference.dtype and torch.equal(ours, reference)
    return ours == reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convert", [{}, {"do_convert_rgb": True}, {"do_convert_grayscale": True}])
def test_pil_of_any_mode(mode, convert):
    image = picture(mode)
    assert same(*both(lambda p: p.preprocess(image), **convert))
    assert same(*both(lambda p: p.preprocess([image, image], 16, 24), do_normalize=False, do_binarize=True, **convert))


@given(st.data())
@settings(max_examples=60)
def test_resizing_and_cropping(data):
    """Every mode of fitting a picture to a size, at any two shapes."""
    side = st.integers(8, 70)
    image = picture(width=data.draw(side), height=data.draw(side))
    options = {
        "resample": data.draw(st.sampled_from(("lanczos", "bicubic", "bilinear", "linear", "nearest"))),
        "vae_scale_factor": data.draw(st.sampled_from((1, 2, 8))),
        "reducing_gap": data.draw(st.sampled_from((None, 2))),
    }
    height, width = data.draw(side), data.draw(side)
    mode = data.draw(st.sampled_from(("default", "fill", "crop")))
    crop = data.draw(st.sampled_from((None, (1, 2, 7, 8), (-3, 0, 20, 90))))
    assert same(*both(lambda p: p.preprocess(image, height, width, mode, crop), **options))
    assert same(*both(lambda p: p.resize(image, height, width, mode), **options))


ARRAYS = {
    "rows": (24, 16),
    "one": (24, 16, 3),
    "gray": (24, 16, 1),
    "batch": (2, 24, 16, 3),
}


@pytest.mark.parametrize("shape", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("options", [{}, {"do_convert_grayscale": True}, {"do_normalize": False, "do_binarize": True}])
def test_arrays(shape, times, options):
    """One or a list of them; a batch of gray ones where gray is asked for."""
    array = np.random.default_rng(0).random(shape, dtype=np.float32)
    given = [array, array[::-1]] if times else array
    if options.get("do_convert_grayscale") and shape == ARRAYS["one"] and not times:
        given = np.moveaxis(array, 2, 0)  # where gray is asked for, three dimensions are a batch of gray ones
    assert same(*both(lambda p: p.preprocess(given), **options))
    assert same(*both(lambda p: p.preprocess(given, 8, 8), **options))


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 3, 24, 16), (1, 24, 16), (4, 24, 16), (2, 4, 8, 8), (9, 1, 8, 8)])
@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("options", [{}, {"do_convert_grayscale": True}, {"do_normalize": False, "do_binarize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_tensors(shape, times, options, dtype):
    """Those of four channels are latents, which pass."""
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = [tensor, tensor] if times else tensor
    assert same(*both(lambda p: p.preprocess(given), **options))


def test_values_from_minus_one_are_not_normalized_again():
    tensor = 2 * torch.rand(1, 3, 16, 16) - 1
    assert same(*both(lambda p: p.preprocess(tensor)))
    with pytest.warns(UserWarning, match=r"\[-1, 1\] already"):
        VaeImageProcessor().preprocess(tensor)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("do_denormalize", [None, [True, False], [False, False]])
def test_postprocess(channels, output_type, do_denormalize):
    tensor = torch.rand(2, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    if do_denormalize is None:
        tensor = 3 * tensor - 1.5  # what lies outside of [-1, 1] is cut off
    for normalized in (True, False):
        if do_denormalize is None and not normalized and output_type == "pil":
            continue  # values outside of [0, 1] have no bytes
        call = lambda p: p.postprocess(tensor, output_type, do_denormalize)  # noqa: E731
        assert same(*both(call, do_normalize=normalized))


@given(st.data())
@settings(max_examples=80)
def test_crop_region_and_overlay(data):
    width, height = data.draw(st.integers(4, 60)), data.draw(st.integers(4, 60))
    mask = np.zeros((height, width), np.uint8)
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask[top : top + data.draw(st.integers(1, 40)), left : left + data.draw(st.integers(1, 40))] = 255
    mask[data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))] = 128
    mask = Image.fromarray(mask)
    size = data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64))
    pad = data.draw(st.integers(0, 12))
    region, expected = both(lambda p: p.get_crop_region(mask, *size, pad))
    assert region == expected
    before, drawn = picture("RGBA", width, height), picture("RGB", width, height, seed=1)
    assert same(*both(lambda p: p.apply_overlay(mask, before, drawn)))
    if region[2] > region[0] and region[3] > region[1]:
        assert same(*both(lambda p: p.apply_overlay(mask, before, drawn, region)))


def test_small_parts():
    image = picture()
    assert same(*both(lambda p: p.blur(image, 3)))
    assert same(*both(lambda p: p.convert_to_rgb(picture("P"))))
    assert same(*both(lambda p: p.convert_to_grayscale(image)))
    assert same(*both(lambda p: p.pil_to_numpy(image)))
    array = np.random.default_rng(0).random((2, 8, 6, 3), dtype=np.float32)
    assert same(*both(lambda p: p.numpy_to_pt(array)))
    assert same(*both(lambda p: p.numpy_to_pt(array[..., 0])))
    assert same(*both(lambda p: p.numpy_to_pil(array)))
    assert same(*both(lambda p: p.numpy_to_pil(array[0])))
    assert same(*both(lambda p: p.pt_to_numpy(p.numpy_to_pt(array).half())))
    assert same(*both(lambda p: p.normalize(array)))
    assert same(*both(lambda p: p.denormalize(p.numpy_to_pt(array) * 3 - 1)))
    assert same(*both(lambda p: p.binarize(array.copy())))
    assert same(*both(lambda p: p.resize(array, 5, 4)))
    for one in (image, array.repeat(4, axis=1).repeat(4, axis=2), torch.rand(1, 3, 9, 8)):
        assert same(*both(lambda p, one=one: p.get_default_height_width(one)))
        assert same(*both(lambda p, one=one: p.get_default_height_width(one, 33, 17)))
    ours, reference = VaeImageProcessor(vae_scale_factor=4), Reference(vae_scale_factor=4)
    for key in ("do_resize", "vae_scale_factor", "vae_latent_channels", "resample", "do_normalize", "do_binarize"):
        assert getattr(ours.config, key) == getattr(reference.config, key)


def test_a_mask_is_not_changed_in_place():
    array = np.full((1, 8, 8, 1), 0.75, np.float32)
    assert VaeImageProcessor.binarize(array).max() == 1
    assert array.max() == 0.75


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("a.png", {}, "image must be a PIL image.*not str"),
        ([], {}, "an empty list"),
        ([picture(), torch.zeros(3, 8, 8)], {}, "not Image, Tensor"),
        (torch.zeros(1, 2, 3, 8, 8), {}, "2, 3 or 4 dimensions"),
        (torch.zeros(8, 8), {}, r"shape \(1, 8, 8\)"),
        ([picture(), picture(width=40)], {"do_resize": False}, "different sizes"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 16, 8)], {}, "different sizes"),
        (np.full((8, 8, 3), 200, np.uint8), {}, "divided by 255"),
        (torch.ones(1, 1, 8, 8).bool(), {}, "torch.bool.*must be float"),
        (np.ones((24, 16, 3)), {"do_convert_grayscale": True}, "16 x 3 pixels is smaller"),  # 24 gray ones, 16 x 3
        (picture(width=5), {}, "29 x 5 pixels is smaller than vae_scale_factor=8"),
    ],
)
def test_what_is_no_picture(image, options, message):
    with pytest.raises(ValueError, match=message):
        VaeImageProcessor(**options).preprocess(image)


def test_what_is_no_setting():
    processor = VaeImageProcessor()
    for call, message in [
        (lambda: VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True), "choose one"),
        (lambda: VaeImageProcessor(resample="best"), "resample='best'.*lanczos"),
        (lambda: processor.resize(picture(), 8, 8, "tile"), "resize_mode='tile'.*default, fill, crop"),
        (lambda: processor.resize(torch.zeros(1, 3, 8, 8), 8, 8, "fill"), "PIL images alone"),
        (lambda: processor.postprocess(torch.zeros(1, 3, 8, 8), "jpg"), "output_type='jpg'.*pil, np"),
        (lambda: processor.postprocess(picture()), "must be a tensor"),
        (lambda: processor.get_crop_region(Image.new("L", (8, 8)), 8, 8), "black throughout"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
