"""Arguments of wrong type, range and shape: a ValueError or TypeError that names the argument. And runs cut short."""

import re

import numpy as np
import pytest
import torch

import minidiff as m

NAN, INF = float("nan"), float("inf")
SCHEDULERS = (m.DDPMScheduler, m.DDIMScheduler, m.PNDMScheduler)


def refuses(argument, call, *arguments, **named):
    """Raised by minidiff's own code, with the argument's name as a word."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*arguments, **named)
    assert re.search(rf"\b{argument}\b", str(caught.value)), f"{argument} isn't in: {caught.value}"
    assert "minidiff" in str(caught.traceback[-1].path), f"from {caught.traceback[-1].path}: {caught.value}"


@pytest.fixture(scope="module")
def pipes(tiny_sd_folder, tiny_ddpm_folder):
    made = {"sd": m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)}
    made["ddpm"] = m.DDPMPipeline.from_pretrained(tiny_ddpm_folder)
    made["ddim"] = m.DDIMPipeline(**made["ddpm"].components)
    made["pndm"] = m.PNDMPipeline(**made["ddpm"].components)
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


# Pipelines


def stable_diffusion_cases():
    embeds = torch.zeros(1, 16, 8)
    for value in (None, 3, b"x", [], [3], ["a", None], {"a": 1}):
        yield "prompt", {"prompt": value}
    for value in (3, [3], ["a", "b"]):
        yield "negative_prompt", {"prompt": "a", "negative_prompt": value}
    for name in ("height", "width"):
        for value in (0, -8, 7, 13, 8.0, "8", True, NAN, [8]):
            yield name, {"prompt": "a", name: value}
    for value in (0, -1, 1001, 2.5, "5", None, NAN, [5], torch.zeros(2)):
        yield "num_inference_steps", {"prompt": "a", "num_inference_steps": value}
    for value in ("7", None, NAN, INF, [7.5], 1j):
        yield "guidance_scale", {"prompt": "a", "guidance_scale": value}
        yield "guidance_rescale", {"prompt": "a", "guidance_rescale": value}
    for value in (0, -1, 1.0, "1", None, True):
        yield "num_images_per_prompt", {"prompt": "a", "num_images_per_prompt": value}
    for value in (3, "seed", [], [torch.Generator()] * 2, [3], torch.zeros(1)):
        yield "generator", {"prompt": "a", "generator": value}
    for value in ("jpg", None, 3, ["pil"]):
        yield "output_type", {"prompt": "a", "output_type": value}
    for value in (-1, 3, 1.0, "1"):
        yield "clip_skip", {"prompt": "a", "clip_skip": value}
    for value in (torch.zeros(1, 4, 7, 8), torch.zeros(2, 4, 8, 8), torch.zeros(4, 8, 8), np.zeros((1, 4, 8, 8)), "x"):
        yield "latents", {"prompt": "a", "latents": value}
    for value in (torch.zeros(1, 16, 7), torch.zeros(16, 8), torch.zeros(0, 16, 8), "x", np.zeros((1, 16, 8))):
        yield "prompt_embeds", {"prompt_embeds": value, "negative_prompt_embeds": embeds}
        yield "negative_prompt_embeds", {"prompt_embeds": embeds, "negative_prompt_embeds": value}
    yield "prompt_embeds", {"prompt": "a", "prompt_embeds": embeds}
    yield "negative_prompt_embeds", {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": embeds}
    for value in ([1, 2], [], [1000, 1], ["x"], 3):
        yield "timesteps", {"prompt": "a", "timesteps": value}
    for value in (["latent"], "latents", [3], 3):
        yield "callback_on_step_end_tensor_inputs", {"prompt": "a", "callback_on_step_end_tensor_inputs": value}
    yield "callback_on_step_end", {"prompt": "a", "callback_on_step_end": 3}


def name_of(value):
    return re.sub(r"0x[0-9a-f]+|\W+", " ", str(value))[:60]  # no addresses: every worker must give the same names


@pytest.mark.parametrize(("argument", "arguments"), list(stable_diffusion_cases()), ids=name_of)
def test_stable_diffusion(pipes, argument, arguments):
    refuses(argument, pipes["sd"], **{"num_inference_steps": 1, "output_type": "latent", **arguments})


@pytest.mark.parametrize("eta", (-0.1, 1.1, NAN, "1", None, [1]))
def test_eta(pipes, eta):
    scheduler = m.DDIMScheduler.from_config(pipes["sd"].scheduler.config)
    pipe = m.StableDiffusionPipeline(**{**pipes["sd"].components, "scheduler": scheduler})
    refuses("eta", pipe, "a", num_inference_steps=3, eta=eta)
    refuses("eta", pipes["ddim"], num_inference_steps=3, eta=eta)


@pytest.mark.parametrize("name", ("ddpm", "ddim", "pndm"))
@pytest.mark.parametrize(
    ("argument", "values"),
    (
        ("batch_size", (0, -1, 1.0, "1", None, True)),
        ("num_inference_steps", (0, -1, 1001, 5.5, "5", None, NAN)),
        ("generator", (3, "seed", [], [torch.Generator()] * 2, [3])),
        ("output_type", ("jpg", "latent", None, 3, ["pil"])),
    ),
)
def test_pixel_pipelines(pipes, name, argument, values):
    for value in values:
        refuses(argument, pipes[name], **{"num_inference_steps": 4, argument: value})


@pytest.mark.parametrize(
    ("argument", "values"),
    (
        ("pretrained_model_name_or_path", (None, 3, b"x", ["a"])),
        ("dtype", ("float16", torch.int8, 16, np.float16)),
        ("torch_dtype", ("float16", torch.int8, 16, np.float16)),
        ("variant", ("", "../x", 3, "a/b", b"x")),
        ("use_safetensors", ("yes", 3, [True])),
        ("stranger", (None, 3)),
    ),
)
def test_from_pretrained(tiny_ddpm_folder, argument, values):
    for value in values:
        argument_or_dtype = r"(torch_)?dtype" if "dtype" in argument else argument
        named = {"pretrained_model_name_or_path": tiny_ddpm_folder, argument: value}
        refuses(argument_or_dtype, m.DDPMPipeline.from_pretrained, **named)
        if argument not in ("stranger", "pretrained_model_name_or_path"):
            folder = named.pop("pretrained_model_name_or_path")
            refuses(argument_or_dtype, m.UNet2DModel.from_pretrained, folder, subfolder="unet", **named)


# Schedulers


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_set_timesteps(cls):
    for value in (0, -1, 1001, 2.5, "5", NAN, [5], torch.zeros(2), torch.tensor(2.5)):
        refuses("num_inference_steps", cls().set_timesteps, value)
    for value in ("gpu", 3.5, ["cpu"]):
        refuses("device", cls().set_timesteps, 5, device=value)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_step(cls):
    scheduler, x = cls(), torch.zeros(1, 3, 4, 4)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0].item()
    for value in (None, 3, "x", np.zeros((1, 3, 4, 4)), [x], x[:, :2], x[0], x.int(), x.bool()):
        refuses("model_output", scheduler.step, value, t, x)
        refuses("sample", scheduler.step, x, t, value)
    for value in (-1, 1000, 2.5, "5", None, NAN, torch.tensor([1, 2]), torch.tensor(2.5)):
        refuses("timestep", scheduler.step, x, value, x)
    if cls is not m.PNDMScheduler:
        for value in (3, "seed", [3], [torch.Generator()] * 2):
            options = {"eta": 1.0} if cls is m.DDIMScheduler else {}
            refuses("generator", scheduler.step, x, t, x, generator=value, **options)


def test_ddims_own_arguments():
    scheduler, x = m.DDIMScheduler(), torch.zeros(1, 3, 4, 4)
    refuses("num_inference_steps", scheduler.step, x, 3, x)
    scheduler.set_timesteps(5)
    for value in (-0.1, NAN, INF, "1", None):
        refuses("eta", scheduler.step, x, 800, x, eta=value)
    for value in (3, np.zeros((1, 3, 4, 4)), x[:, :2], x[0]):
        refuses("variance_noise", scheduler.step, x, 800, x, eta=1.0, variance_noise=value)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_add_noise(cls):
    scheduler, x = cls(), torch.zeros(2, 3, 4, 4)
    for method, first in ((scheduler.add_noise, "original_samples"), (scheduler.get_velocity, "sample")):
        for value in (3, None, torch.tensor([0.5]), torch.tensor([1000]), torch.tensor([-1]), torch.tensor([1, 2, 3])):
            refuses("timesteps", method, x, x, value)
        for value in (3, None, np.zeros((2, 3, 4, 4))):
            refuses(first, method, value, x, torch.tensor([1]))
            refuses("noise", method, x, value, torch.tensor([1]))
        refuses("noise", method, x, x[:, :2], torch.tensor([1]))


# Models


def test_models(tiny_models):
    """Inputs that are no tensors, of wrong shapes, or of another dtype than the weights."""
    unet, condition = tiny_models["UNet2DModel"], tiny_models["UNet2DConditionModel"]
    vae, text = tiny_models["AutoencoderKL"], tiny_models["CLIPTextModel"]
    x, latents, states = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 8)
    for value in (x[:, :2], x[0], x[..., :7], x.new_zeros(2, 3, 0, 8)):
        refuses("sample", unet, value, 3)
    for value in (None, 3, "x", np.zeros((2, 3, 8, 8)), x.double(), x.int(), x.half()):
        refuses("sample", unet, value, 3)
        refuses("sample", condition, value, 3, states)
        refuses("encoder_hidden_states", condition, latents, 3, value)
        refuses("x", vae.encode, value)
        refuses("z", vae.decode, value)
    for value in (torch.zeros(3), torch.zeros(2, 2), None, "3", [3], np.zeros(2)):
        refuses("timestep", unet, x, value)
        refuses("timestep", condition, latents, value, states)
    for value in (latents[:, :3], latents[0]):
        refuses("sample", condition, value, 3, states)
    for value in (states[:1], states[0], states[..., :7]):
        refuses("encoder_hidden_states", condition, latents, 3, value)
    for value in (x[:, :2], x[0], x[:0], torch.zeros(1, 3, 1, 1)):
        refuses("x", vae.encode, value)
    for value in (x, latents[0]):
        refuses("z", vae.decode, value)
    ids = torch.zeros(2, 5).long()
    for value in (torch.zeros(2, 17).long(), ids[0], ids[:, :0], ids[:0], ids.float(), ids.bool(), None, [[1]], "a"):
        refuses("input_ids", text, value)
    for value in (ids - 1, ids + text.config.vocab_size, ids + 2**40):
        refuses("input_ids", text, value)
    for value in (ids[:, :4], ids[0], "mask", [[1] * 5] * 2):
        refuses("attention_mask", text, ids, value)


@pytest.mark.parametrize("side", (1, 2, 3, 4, 5, 7))
def test_pictures_too_small_for_unpadded_downsampling(side):
    """DDPM's padding halves a side rounding down, and there is no half of one pixel."""
    unet = m.UNet2DConditionModel(
        **{"block_out_channels": (4, 4, 4), "norm_num_groups": 2, "cross_attention_dim": 4, "attention_head_dim": 2},
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        downsample_padding=0,
    )
    x, states = torch.zeros(1, 4, side, 8), torch.zeros(1, 2, 4)
    if side < 4:
        refuses("sample", unet, x, 3, states)
    else:
        assert unet(x, 3, states).sample.shape == x.shape


def test_constructors_of_pipelines(pipes):
    sd, ddpm = pipes["sd"].components, pipes["ddpm"].components
    wrong = {
        "vae": (sd["unet"], None, "vae", m.AutoencoderKL),
        "text_encoder": (sd["unet"], None, "text", sd["tokenizer"]),
        "tokenizer": (sd["text_encoder"], None, "tokenizer", m.CLIPTokenizer),
        "unet": (ddpm["unet"], sd["vae"], None, 3, m.UNet2DConditionModel),
        "scheduler": (sd["unet"], None, "pndm", m.PNDMScheduler, sd["scheduler"].config),
        "safety_checker": (sd["unet"], "yes", False),
        "feature_extractor": (sd["unet"], "yes", False),
        "image_encoder": (sd["unet"], "yes", False),
    }
    for name, values in wrong.items():
        for value in values:
            refuses(name, m.StableDiffusionPipeline, **{**sd, name: value})
    for pipeline in (m.DDPMPipeline, m.DDIMPipeline, m.PNDMPipeline):
        for value in (sd["unet"], None, "unet", m.UNet2DModel):
            refuses("unet", pipeline, value, ddpm["scheduler"])
        for value in (ddpm["unet"], None, "ddpm", m.DDPMScheduler):
            refuses("scheduler", pipeline, ddpm["unet"], value)


def test_wrapped_models_are_taken(pipes):
    """Researchers' own modules serve as components, if they are modules."""

    class Halved(torch.nn.Module):
        def __init__(self, unet):
            super().__init__()
            self.unet, self.config, self.device, self.dtype = unet, unet.config, unet.device, unet.dtype

        def forward(self, *arguments, **named):
            return m.models.unet.UNetOutput(self.unet(*arguments, **named).sample / 2)

    pipe = m.StableDiffusionPipeline(**{**pipes["sd"].components, "unet": Halved(pipes["sd"].unet)})
    pipe.set_progress_bar_config(disable=True)
    assert not np.array_equal(picture(pipe).images, picture(pipes["sd"]).images)


# Runs that end early


class Broken(Exception):
    pass


def picture(pipe, **options):
    named = {"prompt": "a red apple"} if isinstance(pipe, m.StableDiffusionPipeline) else {}
    return pipe(**named, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np", **options)


@pytest.mark.parametrize("error", (KeyboardInterrupt, Broken))
@pytest.mark.parametrize("name", ("sd", "ddpm", "ddim", "pndm"))
def test_interrupted_runs_leave_no_trace(pipes, name, error):
    """Ctrl-C in the model, at each of its calls: the next run with the same seed gives the same picture."""
    pipe = pipes[name]
    expected = picture(pipe).images

    for calls in (1, 2, 5, 6):
        left = iter(range(calls - 1))

        def stop(*_, left=left):
            if next(left, None) is None:
                raise error

        hook = pipe.unet.register_forward_pre_hook(stop)
        with pytest.raises(error):
            picture(pipe)
        hook.remove()
        assert np.array_equal(picture(pipe).images, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_stays_finite(tiny_sd_folder, dtype):
    pipe = m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for scheduler in SCHEDULERS:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        assert np.isfinite(picture(pipe).images).all()


def test_a_run_that_overflows_says_at_which_step(pipes):
    def overflow(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * INF} if i == 3 else {}

    with pytest.raises(FloatingPointError, match=r"step 4 of 7 \(timestep 499\)"):
        picture(pipes["sd"], callback_on_step_end=overflow)


def test_channels_that_make_no_picture():
    unet = m.UNet2DModel(
        sample_size=8,
        in_channels=5,
        out_channels=5,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    pipe = m.DDPMPipeline(unet, m.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    refuses("output_type", pipe, num_inference_steps=2)
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 5, 8, 8)


def test_numbers_that_are_none_say_so(pipes):
    with pytest.raises(ValueError, match=r"guidance_scale=nan must be finite$"):
        pipes["sd"]("a", guidance_scale=NAN)
