"""ControlNet beside the reference: what the nets make, the pictures that they steer, folders both ways, training."""

import copy
import functools
import inspect
import json
import threading

import diffusers
import numpy as np
import pytest
import torch
from layouts import make_folder
from PIL import Image
from reference import difference, narrow_config, randomize, twins
from test_image_pipelines import mask, picture, seeded
from test_models import noise, unet_inputs

import minidiff
from minidiff import ConfigError, ControlNetModel, LoadError, MultiControlNetModel, UNet2DConditionModel
from minidiff.__main__ import main
from weights_compat import TABLES, verify

# Measured: equal bits in the nets, 1e-6 in the latents, 2e-6 in the pictures. Asked for are 2e-5 and 1e-4
BOUND, LATENTS, PICTURE = 2e-6, 1e-5, 1e-5
LIBRARIES = (minidiff, diffusers)
XL = "stable-diffusion-xl-base-1.0"
PROMPT = "a photograph of an astronaut riding a horse"
SMALL = {"conditioning_embedding_out_channels": [4, 8, 12, 16]}  # of the control picture's own layers
UNSEEN = "ignore:.*has no safety checker"


def net_config(repository, **changes):
    """A net's config beside the narrow UNet of a repository."""
    config = narrow_config(repository, "unet")[1]
    known = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    return {key: value for key, value in config.items() if key in known} | SMALL | changes


def residuals(output):
    down, mid = output[0], output[1]
    return [*down, mid]


# The network

NO_ATTENTION = {  # XL's small nets
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [0, 0, 0],
}
CONFIGS = {
    "1.5": ("stable-diffusion-v1-5", {}),
    "2.1": ("stable-diffusion-2-1", {}),
    "xl": (XL, {}),
    "xl-small": (XL, NO_ATTENTION),
    "inpainting": ("stable-diffusion-v1-5", {"in_channels": 9}),
    "bgr": ("stable-diffusion-v1-5", {"controlnet_conditioning_channel_order": "bgr"}),
    "pooled": ("stable-diffusion-v1-5", {"global_pool_conditions": True}),
    "classes": ("stable-diffusion-v1-5", {"num_class_embeds": 5}),
    "numbers": ("stable-diffusion-v1-5", {"class_embed_type": "timestep"}),
    "gray": (
        "stable-diffusion-v1-5",
        {"conditioning_channels": 1, "conditioning_embedding_out_channels": [8, 16], "only_cross_attention": True},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_residuals(name):
    repository, changes = CONFIGS[name]
    config = net_config(repository, **changes)
    reference, ours = twins("ControlNetModel", config)
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    for height, width, control in ((16, 16, (16 * factor, 16 * factor)), (17, 12, (17 * factor - 1, 12 * factor))):
        inputs = unet_inputs(config, height, width)
        inputs |= {"class_labels": torch.tensor([4, 0])} if name in ("classes", "numbers") else {}
        inputs["controlnet_cond"] = noise(2, config.get("conditioning_channels", 3), *control, seed=3)
        for options in ({}, {"conditioning_scale": 0.7}, {"conditioning_scale": 1.3, "guess_mode": True}):
            mine, theirs = (residuals(net(**inputs, **options)) for net in (ours, reference))
            assert len(mine) == len(ours.out_down) + 1
            assert max(map(difference, mine, theirs)) <= BOUND
    assert torch.equal(ours(**inputs, return_dict=False)[1], ours(**inputs).mid_block_res_sample)


@pytest.mark.parametrize("name", ["1.5", "xl", "pooled"])
@torch.no_grad()
def test_a_unet_takes_them(name):
    repository, changes = CONFIGS[name]
    reference, ours = twins(*narrow_config(repository, "unet"), seed=1)
    net = twins("ControlNetModel", net_config(repository, **changes))[1]
    inputs = unet_inputs(ours.config, 17, 12)
    down, mid = net(**inputs, controlnet_cond=noise(2, 3, 136, 96, seed=3))
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    expected = reference(**inputs, **added).sample
    assert difference(ours(**inputs, **added).sample, expected) <= BOUND
    assert difference(ours(**inputs).sample, expected) > 1e-2
    for change, message in [
        ({"mid_block_additional_residual": None}, "go together"),
        ({"down_block_additional_residuals": down[1:]}, f"are {len(down) - 1}; this UNet has {len(down)} skip"),
        ({"mid_block_additional_residual": mid[:, 1:]}, r"a residual has shape .* can't be added to \(2, "),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(**inputs, **added | change)


@torch.no_grad()
def test_several_nets():
    config = net_config("stable-diffusion-v1-5")
    pairs = [twins("ControlNetModel", config, seed=seed) for seed in (1, 2, 3)]
    reference, ours = (
        kind(nets)
        for kind, nets in zip(
            (diffusers.MultiControlNetModel, MultiControlNetModel), zip(*pairs, strict=True), strict=True
        )
    )
    inputs = unet_inputs(config) | {"controlnet_cond": [noise(2, 3, 128, 128, seed=seed) for seed in (4, 5, 6)]}
    for options in ({"guess_mode": True}, {}):
        options |= {"conditioning_scale": [1.0, 0.2, -0.5], "return_dict": False}
        mine, theirs = (residuals(nets(**inputs, **options)) for nets in (ours, reference))
        assert max(map(difference, mine, theirs)) <= BOUND
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        ours(**inputs | {"conditioning_scale": [1.0]})


# As they stand on the Hub: keys and values of SD 1.5's, XL's small, and one made from an inpainting UNet
REAL = [
    {
        "_class_name": "ControlNetModel",
        "_diffusers_version": "0.16.0.dev0",
        "_name_or_path": "/home/somebody/controlnet",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "class_embed_type": None,
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "global_pool_conditions": True,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_time_scale_shift": "default",
        "upcast_attention": False,
        "use_linear_projection": False,
    },
    {
        "_class_name": "ControlNetModel",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "conditioning_channels": 3,
        "cross_attention_dim": 2048,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "projection_class_embeddings_input_dim": 2816,
        "upcast_attention": None,
        "use_linear_projection": True,
        **NO_ATTENTION,
    },
    {
        "_class_name": "ControlNetModel",
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "in_channels": 9,
        "use_linear_projection": True,
    },
]


@pytest.mark.parametrize("config", REAL)
def test_configs_of_the_hub(config):
    with torch.device("meta"):
        ours, reference = (library.ControlNetModel.from_config(config) for library in LIBRARIES)
    expected, found = ({name: t.shape for name, t in net.state_dict().items()} for net in (reference, ours))
    table = TABLES["ControlNetModel"]
    assert {table.ours(name): shape for name, shape in expected.items()} == found
    assert {table.hub(name): shape for name, shape in found.items()} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mid_block_type": None}, "mid_block_type=None.*UNetMidBlock2DCrossAttn"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "'gbr' is not supported; supported: 'rgb', 'bgr'"),
        ({"conditioning_embedding_out_channels": []}, "name 1 to 16 levels"),
        ({"up_block_types": ["UpBlock2D"]}, "unknown key up_block_types"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
        ({"down_block_types": ["DownBlock2D"]}, "name 4 blocks"),
    ],
)
def test_configs_that_are_not_supported(change, message):
    with pytest.raises(ConfigError, match=message):
        ControlNetModel.from_config(net_config("stable-diffusion-v1-5") | change)


@torch.no_grad()
def test_inputs_that_do_not_fit():
    config = net_config("stable-diffusion-v1-5")
    net = ControlNetModel(**config)
    inputs = unet_inputs(config) | {"controlnet_cond": noise(2, 3, 128, 128)}
    for change, kind, message in [
        (
            {"controlnet_cond": noise(2, 3, 64, 64)},
            ValueError,
            r"\(2, 3, 64, 64\); beside this sample .*\(2, 3, 128 x 128",
        ),
        ({"controlnet_cond": noise(2, 1, 128, 128)}, ValueError, "controlnet_cond has shape"),
        ({"controlnet_cond": noise(2, 3, 128, 128).half()}, TypeError, "controlnet_cond is torch.float16"),
        ({"encoder_hidden_states": noise(2, 77, 5)}, ValueError, "encoder_hidden_states"),
        ({"sample": noise(2, 9, 16, 16)}, ValueError, r"this ControlNetModel takes \(batch, 4"),
        ({"cross_attention_kwargs": {"scale": 1}}, ValueError, "cross_attention_kwargs must be None"),
        ({"tokens": None}, TypeError, "tokens is no argument of ControlNetModel"),
    ]:
        with pytest.raises(kind, match=message):
            net(**inputs | change)


@torch.no_grad()
def test_compiled_and_exported():
    """Whole, with several nets too; exported with any number of samples."""
    torch.compiler.reset()
    config = net_config("stable-diffusion-v1-5") | {"block_out_channels": [8, 16, 16, 16], "attention_head_dim": 4}
    nets = MultiControlNetModel([ControlNetModel(**config | {"norm_num_groups": 4}) for _ in range(2)]).eval()
    for seed, net in enumerate(nets.nets):
        randomize(net, seed)
    inputs = unet_inputs(config) | {"timestep": torch.tensor(5)}
    control = noise(2, 3, 128, 128)
    expected = residuals(nets(**inputs, controlnet_cond=[control] * 2, conditioning_scale=[1.0, 0.5]))
    compiled = torch.compile(nets, fullgraph=True, backend="eager")
    found = residuals(compiled(**inputs, controlnet_cond=[control] * 2, conditioning_scale=[1.0, 0.5]))
    assert all(map(torch.equal, found, expected))
    net, batch = nets.nets[0], torch.export.Dim("batch", min=2, max=8)
    shapes = {name: {0: batch} for name in ("sample", "encoder_hidden_states", "controlnet_cond")} | {"timestep": None}
    exported = torch.export.export(net, (), inputs | {"controlnet_cond": control}, dynamic_shapes=shapes).module()
    three = {name: torch.cat([value, value[:1]]) for name, value in inputs.items() if name != "timestep"}
    three |= {"timestep": inputs["timestep"], "controlnet_cond": torch.cat([control, control[:1]])}
    assert max(map(difference, residuals(exported(**three)), residuals(net(**three)))) <= BOUND


# Training


def test_from_unet_begins_with_zeros_and_learns():
    """A new net changes nothing, is the reference's tensor for tensor, and learns to undo what was done to the UNet."""
    reference, unet = twins(*narrow_config("stable-diffusion-v1-5", "unet"))
    theirs, net = (
        kind.from_unet(whole, conditioning_embedding_out_channels=(4, 8, 12, 16), conditioning_channels=1)
        for kind, whole in ((diffusers.ControlNetModel, reference), (ControlNetModel, unet))
    )
    own = net.state_dict()
    for name, tensor in theirs.state_dict().items():
        mine = own[TABLES["ControlNetModel"].ours(name)]
        assert mine.shape == tensor.shape
        if "controlnet_" not in name or "controlnet_cond_embedding.conv_out" in name or "cond" not in name:
            assert torch.equal(mine, tensor), name
    assert not ControlNetModel.from_unet(unet, load_weights_from_unet=False).conv_in.weight.equal(unet.conv_in.weight)

    inputs, control = unet_inputs(unet.config), noise(2, 1, 128, 128, seed=9)
    unet.requires_grad_(False)
    goal = unet(**inputs).sample + 0.3

    def loss():
        down, mid = net(**inputs, controlnet_cond=control)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return (unet(**inputs, **added).sample - goal).square().mean()

    torch.testing.assert_close(loss().item(), 0.09, rtol=1e-5, atol=0)  # so nothing has changed
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        loss().backward()
        moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        assert ("conv_in.weight" in moved) == (step > 0)  # zero convolutions let nothing through at first
        assert "out_mid.weight" in moved
        optimizer.step()
    learned = loss()
    assert learned < 0.06
    grads = torch.autograd.grad(learned, [*net.parameters()], allow_unused=True)
    net.enable_gradient_checkpointing()
    again = torch.autograd.grad(loss(), [*net.parameters()], allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True) if a is not None)


def test_unets_of_which_no_net_is_made():
    config = narrow_config("stable-diffusion-v1-5", "unet")[1]
    for change, message in [
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8, which a ControlNet hasn't"),
        ({"mid_block_type": None}, "mid_block_type=None"),
    ]:
        unet = UNet2DConditionModel.from_config(config | change)
        with pytest.raises(ValueError, match=message):
            ControlNetModel.from_unet(unet)


# Pipelines


def make_nets(repository, folder, count=2, **changes):
    """The reference writes them, every parameter random."""
    for seed in range(count):
        net = diffusers.ControlNetModel.from_config(net_config(repository, **changes))
        randomize(net, 10 + seed).save_pretrained(folder / str(seed))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders by what they hold: pipelines, and nets for them."""
    top = tmp_path_factory.mktemp("control")
    for name, repository in {"sd": "stable-diffusion-v1-5", "xl": XL, "9ch": "stable-diffusion-inpainting"}.items():
        make_folder(repository, top / name, seed=4)
    make_nets("stable-diffusion-v1-5", top / "nets")
    make_nets("stable-diffusion-v1-5", top / "pooled", 1, global_pool_conditions=True)
    make_nets(XL, top / "xl-nets")
    make_nets(XL, top / "xl-pooled", 1, global_pool_conditions=True)
    return top


@functools.cache
def load(library, places, name, which="nets", count=1, folder="sd"):
    nets = [library.ControlNetModel.from_pretrained(places / which / str(i)) for i in range(count)]
    options = {"controlnet": nets if count > 1 else nets[0], "torch_dtype": torch.float32}
    options |= {} if folder == "xl" else {"safety_checker": None, "feature_extractor": None}
    options |= {"add_watermarker": False} if folder == "xl" else {"requires_safety_checker": False}
    pipe = getattr(library, f"StableDiffusion{name}Pipeline").from_pretrained(places / folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(places, name, which="nets", count=1, folder="sd"):
    """The same pipelines again and again: leave them as they are, but for the scheduler."""
    return [load(library, places, name, which, count, folder) for library in LIBRARIES]


@pytest.fixture(scope="module")
def text(places):
    return both(places, "ControlNet")


@pytest.fixture(scope="module")
def two(places):
    return both(places, "ControlNet", count=2)


def draw(pipe, callback_on_step_end=None, seeds=0, **arguments):
    """The pictures, and the latents after every step."""
    steps = []

    def keep(pipe, i, t, tensors):
        steps.append(tensors["latents"])
        return tensors if callback_on_step_end is None else callback_on_step_end(pipe, i, t, tensors)

    generator = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "output_type": "np", "generator": generator} | arguments
    images = pipe(callback_on_step_end=keep, **arguments).images
    return [np.asarray(image, np.float32) for image in images], steps


def compare(pipes, **arguments):
    """Each draws the same; returns what was drawn."""
    (ours, latents), (expected, expected_latents) = (draw(pipe, **copy.copy(arguments)) for pipe in pipes)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= (1 if arguments.get("output_type") == "pil" else PICTURE)
    for mine, theirs in zip(latents, expected_latents, strict=True):
        assert difference(mine, theirs) <= LATENTS
    return latents[-1]


def swap(pipes, name):
    for pipe, library in zip(pipes, LIBRARIES, strict=True):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)


IMAGES = {
    "pil": picture(),
    "gray": picture(mode="L"),
    "odd": picture(75, 50),
    "list": [picture(), picture(seed=1)],
    "numpy": np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32),
    "arrays": [np.random.default_rng(i).random((64, 40, 3), dtype=np.float32) for i in range(2)],
    "tensor": torch.rand(1, 3, 64, 40, generator=seeded()),
    "tensors": [torch.rand(3, 64, 64, generator=seeded(i)) for i in range(2)],
    "batch": torch.rand(2, 3, 72, 64, generator=seeded(3)),
}
TWO = {"prompt": [PROMPT, "a cat"]}
OPTIONS = [
    {"controlnet_conditioning_scale": 0.4},
    {"controlnet_conditioning_scale": 0.0},
    {"guess_mode": True},
    {"guess_mode": True, "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.8},
    {"guidance_scale": 1.0, "num_images_per_prompt": 2},
    {"control_guidance_start": 0.3},
    {"control_guidance_end": 0.5},
    {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "num_inference_steps": 7, "guess_mode": True},
    {"negative_prompt": "blurred", "height": 72, "width": 40},
    {"height": 70, "width": 50},
    {"seeds": [1, 2], "num_images_per_prompt": 2, "eta": 0.5},
    TWO | {"num_images_per_prompt": 2, "negative_prompt": ["blurred", "a dog"]},
]


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_control_picture(text, name):
    compare(text, image=IMAGES[name], **TWO if name in ("list", "arrays", "tensors", "batch") else {})


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_text_to_image(text, options):
    swap(text, "DDIMScheduler")
    compare(text, image=picture(), **options)


@pytest.mark.parametrize("scheduler", ["PNDM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_schedulers(text, scheduler):
    """Heun asks the network twice at most steps: both count among the run's."""
    swap(text, f"{scheduler}Scheduler")
    compare(text, image=picture(), num_inference_steps=5, control_guidance_start=0.25, control_guidance_end=0.8)


PAIR = [picture(), picture(seed=1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"controlnet_conditioning_scale": [0.3, 1.0]},
        {"control_guidance_start": [0.0, 0.5], "control_guidance_end": 0.8},
        {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.4, 1.0], "guess_mode": True},
        TWO | {"image": [PAIR, [picture(seed=2), picture(seed=3)]], "num_images_per_prompt": 2},
        TWO | {"image": [IMAGES["batch"], picture(72, 64)], "controlnet_conditioning_scale": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_several_at_once(two, options):
    compare(two, **{"image": PAIR} | options)


def test_pooled_nets_are_in_guess_mode(places):
    pipes = both(places, "ControlNet", "pooled")
    drawn = compare(pipes, image=picture())
    assert torch.equal(drawn, compare(pipes, image=picture(), guess_mode=True))


@pytest.fixture(scope="module")
def image(places):
    return both(places, "ControlNetImg2Img")


CONTROL = {"image": picture(), "control_image": picture(seed=7)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strength": 0.5, "control_guidance_start": 0.4, "num_inference_steps": 8},
        {"guess_mode": True, "controlnet_conditioning_scale": 1.2},
        {"image": picture(75, 50), "control_image": picture(72, 48, 7)},
        {"image": picture(75, 50), "height": 64, "width": 72},
        {"image": IMAGES["tensor"], "control_image": IMAGES["tensor"]},
        {"image": torch.randn(1, 4, 8, 8, generator=seeded())},
        {"latents": torch.randn(1, 4, 8, 8, generator=seeded(1))},
        TWO | {"image": IMAGES["list"], "control_image": IMAGES["tensors"], "num_images_per_prompt": 2},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("scheduler", ["PNDM", "EulerDiscrete"])
def test_image_to_image(image, options, scheduler):
    swap(image, f"{scheduler}Scheduler")
    compare(image, **CONTROL | options)


@pytest.fixture(scope="module", params=["sd", "9ch"])
def inpaint(places, request):
    return both(places, "ControlNetInpaint", folder=request.param)


PART = CONTROL | {"mask_image": mask()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strength": 0.6, "guess_mode": True, "num_inference_steps": 6, "control_guidance_end": 0.5},
        {"height": 72, "width": 40, "guidance_scale": 1.0, "num_images_per_prompt": 2},
        {
            **{"image": picture(80, 96), "mask_image": mask(80, 96), "control_image": picture(80, 96, 7)},
            **{"padding_mask_crop": 4, "output_type": "pil"},
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_inpainting(inpaint, options):
    compare(inpaint, **PART | options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("XLControlNet", {"image": picture(64, 72)}),
        (
            "XLControlNet",
            {"image": picture(75, 50), "guess_mode": True, "prompt_2": "a cat", "negative_prompt": "dogs"},
        ),
        ("XLControlNet", {"image": picture(), "denoising_end": 0.7, "control_guidance_end": 0.6, "eta": 0.5}),
        ("XLControlNet", {"image": picture(), "original_size": (40, 40), **TWO, "num_images_per_prompt": 2}),
        ("XLControlNetImg2Img", CONTROL),
        ("XLControlNetImg2Img", CONTROL | {"strength": 0.5, "height": 72, "width": 40, "guess_mode": True}),
        ("XLControlNetImg2Img", CONTROL | {"latents": torch.randn(1, 4, 8, 8, generator=seeded(1))}),
        ("XLControlNetInpaint", PART),
        ("XLControlNetInpaint", PART | {"strength": 0.5, "guess_mode": True, "control_guidance_start": 0.4}),
        ("XLControlNetInpaint", PART | {"denoising_start": 0.3, "denoising_end": 0.8, "control_guidance_end": 0.6}),
        ("XLControlNetInpaint", PART | {"padding_mask_crop": 4, "output_type": "pil"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_xl(places, name, options):
    compare(both(places, name, "xl-nets", folder="xl"), **options)


def test_xl_with_several_nets_and_pooled_ones(places):
    pair = {"image": PAIR, "controlnet_conditioning_scale": [0.4, 0.9]}
    compare(both(places, "XLControlNet", "xl-nets", 2, "xl"), **pair)
    compare(both(places, "XLControlNet", "xl-pooled", 1, "xl"), image=picture())
    # Here the reference steers both passes, with the prompt and without it: elsewhere guess mode would be on
    pipes = both(places, "XLControlNetInpaint", "xl-pooled", 1, "xl")
    assert difference(compare(pipes, **PART), draw(pipes[0], **PART, guess_mode=True)[1][-1]) > 1e-3


def test_nets_run_only_where_they_steer(two):
    calls, pipe = [0, 0], two[0]
    handles = [
        net.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1)) for i, net in enumerate(pipe.nets)
    ]
    pipe(PROMPT, PAIR, num_inference_steps=10, control_guidance_end=0.5, output_type="latent")
    for handle in handles:
        handle.remove()
    assert calls == [5, 5]


def test_what_a_callback_sees_and_changes(text):
    """The control picture is among its tensors; guidance may end on the way."""

    def change(pipe, i, t, tensors):
        assert tensors["image"].shape[1:] == (3, 64, 64)
        if i == 0:
            tensors["image"] = tensors["image"].flip(-1)
        if i == 1:
            pipe._guidance_scale = 1.0
            tensors["image"], tensors["prompt_embeds"] = (tensors[n].chunk(2)[1] for n in ("image", "prompt_embeds"))
        return tensors

    swap(text, "DDIMScheduler")
    names = ["latents", "prompt_embeds", "image"]
    changed = compare(text, image=picture(), callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert difference(compare(text, image=picture()), changed) > 1e-3
    pipe = text[0]
    pipe(PROMPT, picture(), num_inference_steps=3, guidance_scale=4.0, output_type="latent")
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.scheduler.num_inference_steps) == (4.0, 3, 3)


def test_calls_do_not_disturb_one_another(text):
    """Two threads, and a run inside a callback, each with a control picture of its own."""
    pipe, drawn = text[0], {}
    alone = {seed: draw(pipe, image=picture(seed=seed))[1][-1] for seed in (1, 2)}

    def inside(run, i, t, tensors):
        if i == 1:
            drawn["inside"] = draw(run, image=picture(seed=2))[1][-1]
        return tensors

    drawn["outside"] = draw(pipe, image=picture(seed=1), callback_on_step_end=inside)[1][-1]
    threads = [
        threading.Thread(target=lambda seed=seed: drawn.update({seed: draw(pipe, image=picture(seed=seed))[1][-1]}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, seed in (("outside", 1), ("inside", 2), (1, 1), (2, 2)):
        assert torch.equal(drawn[name], alone[seed])

    def stop(run, i, t, tensors):
        pipe._interrupt = i == 1
        return tensors

    assert len(draw(pipe, image=picture(), callback_on_step_end=stop)[1]) == 2
    assert len(draw(pipe, image=picture())[1]) == 4


def test_nets_of_another_dtype_and_compiled_ones(text):
    pipe = text[0]
    expected = draw(pipe, image=picture())[1][-1]
    torch.compiler.reset()
    own = {**pipe.components, "controlnet": torch.compile(pipe.controlnet, backend="eager", fullgraph=True)}
    compiled = minidiff.StableDiffusionControlNetPipeline(**own, requires_safety_checker=False)
    compiled.set_progress_bar_config(disable=True)
    assert torch.equal(draw(compiled, image=picture())[1][-1], expected)
    own["controlnet"] = copy.deepcopy(pipe.controlnet).to(torch.bfloat16)
    half = minidiff.StableDiffusionControlNetPipeline(**own, requires_safety_checker=False)
    half.set_progress_bar_config(disable=True)
    assert difference(draw(half, image=picture())[1][-1], expected) < 0.1


@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_nets_come_and_go_with_their_unet(text, switch, monkeypatch):
    parts = {name: copy.deepcopy(part) for name, part in text[0].components.items()}
    pipe = minidiff.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    expected, moves, move = draw(pipe, image=picture())[0], [], torch.nn.Module.to
    getattr(pipe, switch)(device="cpu")
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *args: moves.append(type(self).__name__) or move(self, *args)
    )
    assert np.array_equal(draw(pipe, image=picture())[0], expected)
    if switch == "enable_model_cpu_offload":
        names = ["CLIPTextModel", "UNet2DConditionModel", "ControlNetModel", "AutoencoderKL"]  # in, and out again
        assert [moves.count(name) for name in names] == [2, 2, 2, 1]


# Folders, and what chooses and shares


@pytest.mark.parametrize("count", [1, 2])
def test_folders_both_ways(places, tmp_path, count):
    pipes = both(places, "ControlNet", count=count)
    control = picture() if count == 1 else [picture(seed=seed) for seed in range(count)]
    drawn = compare(pipes, image=control)
    for pipe, other, name in zip(pipes, reversed(LIBRARIES), ("ours", "theirs"), strict=True):
        pipe.save_pretrained(tmp_path / name)
        kind = "ControlNetModel" if count == 1 else "MultiControlNetModel"
        assert json.loads((tmp_path / name / "model_index.json").read_text())["controlnet"] == ["diffusers", kind]
        loaded = other.DiffusionPipeline.from_pretrained(tmp_path / name, torch_dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert difference(draw(loaded, image=control)[1][-1], drawn) <= LATENTS
        ours = minidiff.DiffusionPipeline.from_pretrained(tmp_path / name)
        assert [type(net) for net in ours.nets] == [ControlNetModel] * count
    saved = json.loads((tmp_path / "ours/controlnet/config.json").read_text())
    assert saved.keys() - {"_class_name", "_diffusers_version", "_name_or_path"} <= set(
        inspect.signature(diffusers.ControlNetModel.__init__).parameters
    )


def test_folders_of_several_nets(two, tmp_path):
    nets = two[0].controlnet
    nets.save_pretrained(tmp_path / "net")
    two[1].controlnet.save_pretrained(str(tmp_path / "theirs"))
    for name in ("net", "theirs"):
        for library in LIBRARIES:
            loaded = library.MultiControlNetModel.from_pretrained(str(tmp_path / name))
            assert len(loaded.nets) == 2
        ours = MultiControlNetModel.from_pretrained(tmp_path / name, torch_dtype=torch.float16).state_dict()
        assert all(torch.equal(tensor.half(), ours[key]) for key, tensor in nets.state_dict().items())
    with pytest.raises(ValueError, match="net_1 would be loaded as one net more than the 1 there are: remove it"):
        MultiControlNetModel([nets.nets[0]]).save_pretrained(tmp_path / "net")
    (tmp_path / "net_1/config.json").unlink()
    with pytest.raises(LoadError, match=r"net_1/config\.json: no such file"):
        MultiControlNetModel.from_pretrained(tmp_path / "net")
    pipe = minidiff.StableDiffusionControlNetPipeline(**two[0].components, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    assert sorted(file.name for file in (tmp_path / "pipe/controlnet_1").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    assert len(minidiff.DiffusionPipeline.from_pretrained(tmp_path / "pipe", variant="fp16").nets) == 2


TASKS = {"Text2Image": "", "Image2Image": "Img2Img", "Inpainting": "Inpaint"}


@pytest.mark.parametrize("system", ["StableDiffusion", "StableDiffusionXL"])
def test_auto_pipelines(places, tmp_path, system):
    folder, which = ("xl", "xl-nets") if system.endswith("XL") else ("sd", "nets")
    steered = load(minidiff, places, f"{system.removeprefix('StableDiffusion')}ControlNet", which, folder=folder)
    net = steered.controlnet
    steered.save_pretrained(tmp_path)
    options = {} if folder == "xl" else {"safety_checker": None, "requires_safety_checker": False}
    for task, end in TASKS.items():
        auto = getattr(minidiff, f"AutoPipelineFor{task}")
        found = auto.from_pipe(steered)
        assert (type(found).__name__, found.controlnet) == (f"{system}ControlNet{end}Pipeline", net)
        plain = auto.from_pipe(steered, controlnet=None)
        assert type(plain).__name__ == f"{system}{end}Pipeline"
        assert type(auto.from_pipe(plain)) is type(plain)
        assert type(auto.from_pipe(plain, controlnet=net)) is type(found)
        # As folders name them: a steered one's, a plain one's
        assert auto._of_family(type(steered).__name__, "here", {}) == (type(found), {})
        assert auto._of_family(type(plain).__name__, "here", {"controlnet": net}) == (type(found), {"controlnet": net})
    loaded = minidiff.AutoPipelineForInpainting.from_pretrained(tmp_path)
    assert type(loaded).__name__ == f"{system}ControlNetInpaintPipeline"
    loaded = minidiff.AutoPipelineForImage2Image.from_pretrained(places / folder, controlnet=net, **options)
    assert (type(loaded).__name__, loaded.controlnet) == (f"{system}ControlNetImg2ImgPipeline", net)
    with pytest.raises(LoadError, match="no AutoPipelineForInpainting"):
        minidiff.AutoPipelineForInpainting._of_family("LatentConsistencyModelPipeline", "here", {"controlnet": net})


@pytest.mark.parametrize("name", ["", "XL"])
@pytest.mark.parametrize("end", TASKS.values())
def test_arguments_are_the_references(name, end):
    """All of them, at their defaults: those that the plain pipeline has are handed on to it."""
    steered = f"StableDiffusion{name}ControlNet{end}Pipeline"
    expected = inspect.signature(getattr(diffusers, steered).__call__).parameters
    own = inspect.signature(getattr(minidiff, steered).__call__).parameters
    for key, parameter in expected.items():
        if key not in ("self", "kwargs"):
            default = own[key].default
            assert default == parameter.default or [*default] == parameter.default
    leading = [key for key, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert leading == [*expected][: len(leading)]
    made, theirs = (inspect.signature(getattr(library, steered)).parameters for library in LIBRARIES)
    assert made.keys() == theirs.keys()


# The command line, and verify


def test_verify(capsys):
    assert verify.main(["stable-diffusion-v1-5", "--random", "--controlnet", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "controlnet: guess mode" in out
    assert "StableDiffusionControlNetPipeline: decoded" in out
    with pytest.raises(SystemExit):
        verify.main(["folder", "--controlnet"])
    assert "argument --controlnet: needs a net's folder, without --random" in capsys.readouterr().err


def test_command_line(tiny_sd_folder, tmp_path, monkeypatch, capsys):
    """A folder, a picture; two of each; beside a picture to begin with, and one to draw in."""
    monkeypatch.chdir(tmp_path)
    pipe = minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    for i in range(2):
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
        randomize(net, i).save_pretrained(f"net{i}")
        picture(16, 12, i).save(f"edges{i}.png")
    mask(16, 12).save("mask.png")
    nets = [ControlNetModel.from_pretrained(f"net{i}") for i in range(2)]
    one = ["--control", "net0", "--control-image", "edges0.png"]
    both_ = [*one, "--control", "net1", "--control-image", "edges1.png"]
    begin, part, edges = ["--image", "edges1.png"], ["--mask", "mask.png"], picture(16, 12)
    for flags, task, net, options in [
        (one, "Text2Image", nets[0], {"image": edges}),
        (both_, "Text2Image", nets, {"image": [edges, picture(16, 12, 1)]}),
        ([*one, *begin], "Image2Image", nets[0], {"image": picture(16, 12, 1), "control_image": edges}),
        (
            [*one, *begin, *part],
            "Inpainting",
            nets[0],
            {"image": picture(16, 12, 1), "mask_image": mask(16, 12), "control_image": edges},
        ),
    ]:
        assert main(["red apple", "--model", str(tiny_sd_folder), "--steps", "4", "--device", "cpu", *flags]) == 0
        steered = getattr(minidiff, f"AutoPipelineFor{task}").from_pipe(pipe, controlnet=net)
        expected = steered("red apple", num_inference_steps=4, generator=[seeded()], **options).images[0]
        with Image.open("minidiff.png") as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(expected))
            assert "edges0.png" in drawn.text["control_image"]
    drawn = ["red apple", "--model", str(tiny_sd_folder), "--steps", "1", "--device", "cpu"]
    assert main([*drawn, *one, "--height", "24"]) == 0
    assert Image.open("minidiff.png").size == (18, 24)  # in the shape of its control picture
    picture(8, 12).save("edges1.png")
    capsys.readouterr()
    assert main([*drawn, *both_]) == 1
    told = "error: --control-image: edges0.png is 12 x 16, edges1.png is 12 x 8: make them of one size, or give"
    assert capsys.readouterr().err.startswith(told)
    assert main([*drawn, *both_, "--height", "16", "--width", "12"]) == 0
    pipe.save_pretrained("pipe", variant="fp16"), nets[0].save_pretrained("net", variant="fp16")
    for net in ("net", "net0"):  # the second one has no such weights
        capsys.readouterr()
        half = ["--model", "pipe", "--variant", "fp16", "--control", net, "--control-image", "edges0.png"]
        assert main([*drawn, *half]) == 0
        assert ("net0: no weights found" in capsys.readouterr().err) == (net == "net0")
    with pytest.raises(SystemExit):
        main(["red apple", "--control", "net0"])
    assert "argument --control-image: give one for each --control" in capsys.readouterr().err
    assert main(["a", "--model", str(tiny_sd_folder), "--control", "nowhere/", "--control-image", "edges0.png"]) == 1
    assert "error: --control: nowhere/: there is no such folder" in capsys.readouterr().err


# Bad input: one clear error, before anything is computed


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"image": None}, ValueError, "image is None: give the picture"),
        ({"image": "picture.png"}, ValueError, "image must be a PIL image"),
        ({"image": torch.rand(1, 1, 64, 64)}, ValueError, r"image has shape \(1, 1, 64, 64\) .* \(n, \*\(3, 64, 64"),
        ({"image": [picture(), picture(48, 48)], "height": None}, None, ""),
        ({"image": IMAGES["batch"][[0, 1, 1]], "prompt": ["a", "b"]}, ValueError, "image holds 3 for 2 pictures"),
        ({"controlnet_conditioning_scale": [1.0, 0.5]}, ValueError, "has 2 numbers for 1 ControlNets"),
        ({"controlnet_conditioning_scale": "1"}, TypeError, "controlnet_conditioning_scale must be a number"),
        ({"controlnet_conditioning_scale": float("nan")}, ValueError, "controlnet_conditioning_scale=nan"),
        ({"control_guidance_start": 0.6, "control_guidance_end": 0.6}, ValueError, "start=0.6 must be less than"),
        ({"control_guidance_start": -0.1}, ValueError, "control_guidance_start=-0.1 must be finite, and in 0..1"),
        ({"control_guidance_end": 1.1}, ValueError, "control_guidance_end=1.1 must be finite, and in 0..1"),
        ({"control_guidance_end": [1.0, 0.5]}, ValueError, "control_guidance_end has 2 numbers"),
        ({"height": 4}, ValueError, "height=4 must be 8 or more"),
        ({"width": "64"}, TypeError, "width must be an integer"),
        ({"guidance_scael": 3}, TypeError, "did you mean guidance_scale"),
    ],
)
def test_bad_arguments(text, options, kind, message):
    pipe, seen = text[0], []
    handle = pipe.controlnet.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(kind or ValueError, match=message):
        pipe(**{"prompt": PROMPT, "image": picture(), "num_inference_steps": 1} | options)
    handle.remove()
    assert not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": picture()}, "image must be a list of 2 pictures, one for each net"),
        ({"image": [picture()]}, "image must be a list of 2 pictures, one for each net"),
        ({"image": [[picture()], PAIR]}, "image must be a list of 2 pictures, one for each net"),
        ({"image": [picture(), picture(48, 48)]}, r"image has shape \(1, 3, 48, 48\) as a tensor"),
        ({"controlnet_conditioning_scale": [1.0]}, "has 1 numbers for 2 ControlNets"),
        ({"control_guidance_start": [0.0, 0.5], "control_guidance_end": [1.0, 0.5]}, "start=0.5 must be less"),
    ],
)
def test_bad_arguments_for_several(two, options, message):
    with pytest.raises(ValueError, match=message):
        two[0](**{"prompt": PROMPT, "image": PAIR} | options)


def test_bad_pictures_beside(image):
    with pytest.raises(
        ValueError, match=r"image are latents of a picture of \(64, 72\), but control_image is of \(64, 64\)"
    ):
        image[0](PROMPT, torch.randn(1, 4, 8, 9), picture())
    with pytest.raises(ValueError, match=r"latents has shape \(1, 4, 8, 9\); these arguments need \(1, 4, 8, 8\)"):
        image[0](PROMPT, picture(), picture(), latents=torch.randn(1, 4, 8, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": 32}, "it has cross_attention_dim=32, unet has 24"),
        ({"block_out_channels": [32, 64, 64, 64]}, "it has block_out_channels"),
        ({"layers_per_block": 1}, "it has layers_per_block=1"),
        ({"in_channels": 9}, "controlnet has 9 input channels; it must read latents alone: 4"),
    ],
)
def test_nets_of_another_unet(text, change, message):
    own = {**text[0].components, "controlnet": ControlNetModel(**net_config("stable-diffusion-v1-5", **change))}
    with pytest.raises(ValueError, match=message):
        minidiff.StableDiffusionControlNetPipeline(**own)
    for wrong in ("unet", "vae"):
        with pytest.raises(TypeError, match="controlnet must be a ControlNetModel"):
            minidiff.StableDiffusionControlNetPipeline(**{**own, "controlnet": own[wrong]})
    with pytest.raises(TypeError, match="unet must be a UNet2DConditionModel, but is ControlNetModel"):
        minidiff.StableDiffusionControlNetPipeline(**{**own, "unet": own["controlnet"]})
