"""Calls of one pipeline don't disturb one another; what a callback changes counts for its run; nothing is ignored."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import minidiff

TEXT_SAMPLERS = [
    name for name in minidiff.schedulers.__all__ if not getattr(minidiff, name).own_loop and name.endswith("Scheduler")
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe(tiny_sd_folder):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_sampler(pipe, name):
    other = minidiff.StableDiffusionPipeline(**pipe.components)
    other.scheduler = getattr(minidiff, name).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


def draw(pipe, seed=0, steps=4, **options):
    options = {"num_inference_steps": steps, "output_type": "latent", "generator": seeded(seed), **options}
    return pipe("a red apple", **options).images


# Threads


@pytest.mark.parametrize("name", TEXT_SAMPLERS)
def test_two_threads_draw_as_one_alone(pipe, name):
    """Of different step counts too, by turns: five seeds each."""
    shared = with_sampler(pipe, name)
    alone = {seed: draw(with_sampler(pipe, name), seed, 4 + seed % 2) for seed in range(10)}
    drawn, together = {}, threading.Barrier(2)

    def work(seeds):
        for seed in seeds:
            together.wait(timeout=60)
            drawn[seed] = draw(shared, seed, 4 + seed % 2)

    threads = [threading.Thread(target=work, args=(seeds,)) for seeds in (range(5), range(5, 10))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn.keys() == alone.keys()
    assert all(drawn[seed].equal(alone[seed]) for seed in alone)


def test_two_pipelines_share_a_scheduler(pipe):
    """The same components in another pipeline: a run inside the other's callback has a state of its own."""
    other = minidiff.StableDiffusionPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    expected, inner = draw(pipe, 1), []

    def inside(run, i, t, tensors):
        inner.append(draw(other, 1, 5 + i))

    assert draw(pipe, 1, callback_on_step_end=inside).equal(expected)
    assert all(one.equal(draw(pipe, 1, 5 + i)) for i, one in enumerate(inner))


def test_a_run_inside_its_own_callback(pipe):
    expected, nested = draw(pipe, 2), draw(pipe, 3, 6)
    inner = []

    def inside(run, i, t, tensors):
        inner.append(draw(run, 3, 6))

    assert draw(pipe, 2, callback_on_step_end=inside).equal(expected)
    assert inner and all(one.equal(nested) for one in inner)
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps) == 5  # PNDM's four steps, of the outer run


def test_a_run_inside_a_run_inside_a_run(pipe):
    """On its view, twice: each takes a scheduler of its own."""
    other = with_sampler(pipe, "EulerDiscreteScheduler")
    expected, drawn = [draw(other, seed, 3 + seed) for seed in range(3)], {}

    def at(depth):
        def inside(run, i, t, tensors):
            if i == 1:
                drawn[depth] = draw(run, depth, 3 + depth, callback_on_step_end=at(depth + 1) if depth < 2 else None)

        return inside

    assert draw(other, 0, 3, callback_on_step_end=at(1)).equal(expected[0])
    assert drawn[1].equal(expected[1]) and drawn[2].equal(expected[2])


def test_copies_and_pickles_draw_the_same(pipe):
    expected, copies = draw(pipe), []

    def copy_now(run, i, t, tensors):
        copies.extend([copy.deepcopy(run), pickle.loads(pickle.dumps(run)), copy.copy(run)] if i == 1 else [])

    draw(pipe, callback_on_step_end=copy_now)
    assert len(copies) == 3
    assert all(draw(one).equal(expected) for one in [*copies, copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))])


def test_an_interrupted_run_leaves_nothing_behind(pipe):
    expected = draw(pipe, 4)

    def stop(run, i, t, tensors):
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, 4, callback_on_step_end=stop)
    assert draw(pipe, 4).equal(expected)


# Callbacks


def test_interrupt_from_a_callback(pipe):
    seen = []

    def stop(run, i, t, tensors):
        seen.append(tensors["latents"].clone())
        run._interrupt = i == 1

    assert draw(pipe, callback_on_step_end=stop).equal(seen[-1])
    assert len(seen) == 2
    assert draw(pipe).shape == seen[0].shape and not draw(pipe).equal(seen[-1])  # the next run is whole


def test_interrupt_from_outside_stops_all_runs(pipe):
    counts = {0: 0, 1: 0}
    started, go_on = threading.Barrier(3), threading.Event()

    def work(number):
        def count(run, i, t, tensors):
            counts[number] += 1
            if i == 0:
                started.wait(timeout=60)
                go_on.wait(timeout=60)

        draw(pipe, number, 20, callback_on_step_end=count)

    threads = [threading.Thread(target=work, args=(number,)) for number in counts]
    for thread in threads:
        thread.start()
    started.wait(timeout=60)
    pipe._interrupt = True
    go_on.set()
    for thread in threads:
        thread.join()
    assert counts == {0: 1, 1: 1}


def test_an_interrupt_stops_its_own_run_alone(pipe):
    expected, inner = draw(pipe, 5), []

    def stop_inner(run, i, t, tensors):
        run._interrupt = True

    def inside(run, i, t, tensors):
        inner.append(draw(run, 6, callback_on_step_end=stop_inner))

    assert draw(pipe, 5, callback_on_step_end=inside).equal(expected)


def test_dynamic_guidance(pipe):
    """The documentation's example: no guidance after the first steps, and the prompt's half of the states."""

    def off(run, i, t, tensors):
        if i == 1:
            run._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    changed = draw(pipe, callback_on_step_end=off, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not changed.equal(draw(pipe)) and not changed.equal(draw(pipe, guidance_scale=0.0))
    assert pipe.guidance_scale == 0.0

    def half(run, i, t, tensors):
        run._guidance_scale = 0.0

    with pytest.raises(ValueError, match=r"prompt_embeds has 2 rows, but guidance_scale=0\.0 needs 1"):
        draw(pipe, callback_on_step_end=half)


def test_returned_negative_prompt_embeds_are_taken_over(pipe):
    states, negatives = pipe.encode_prompt("a red apple", None, 1, True, "blue")
    names = ["prompt_embeds", "negative_prompt_embeds"]

    def drawn(answer):
        def change(run, i, t, tensors):
            assert tensors["prompt_embeds"].shape[0] == 2 and tensors["negative_prompt_embeds"].shape[0] == 1
            return answer if i == 0 else None

        return draw(pipe, steps=2, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)

    assert not drawn({"negative_prompt_embeds": negatives}).equal(drawn(None))
    assert drawn({"prompt_embeds": torch.cat([negatives, states])}).equal(drawn({"negative_prompt_embeds": negatives}))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"latent": torch.zeros(1)}, "returned 'latent', which is none of latents, prompt_embeds"),
        ({"latents": torch.zeros(1, 4, 4, 8)}, "returned latents of shape"),
        ({"latents": None}, "latents must be a tensor"),
        ([1], "must return a dict or None"),
        ({"prompt_embeds": torch.zeros(3, 16, 8)}, "prompt_embeds has 3 rows"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, answer, message):
    with pytest.raises((ValueError, TypeError), match=message):
        draw(pipe, callback_on_step_end=lambda *_: answer)


def test_the_older_callback(pipe):
    seen = []
    draw(pipe, callback=lambda i, t, latents: seen.append((i, t.item(), latents.shape)), callback_steps=2)
    assert [i for i, *_ in seen] == [0, 2, 4]


# Arguments without effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "the negative prompt has no effect"),
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "guidance_rescale has no effect"),
        ({"eta": 0.5}, "eta has no effect"),
    ],
)
def test_arguments_without_effect_are_a_warning(pipe, options, message):
    with pytest.warns(UserWarning, match=message) as caught:
        draw(pipe, steps=2, **options)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, steps=2)


def test_clip_skip_beside_embeddings_is_a_warning(pipe):
    states, negatives = pipe.encode_prompt("a red apple")
    given = {"prompt_embeds": states, "negative_prompt_embeds": negatives, "num_inference_steps": 2, "clip_skip": 1}
    with pytest.warns(UserWarning, match="clip_skip has no effect beside prompt_embeds"):
        pipe(**given)
    for value in (50, -1):
        with pytest.raises(ValueError, match=f"clip_skip={value} must be an integer from 0 to"):
            pipe.encode_prompt("a red apple", clip_skip=value)


def test_long_embeddings(pipe):
    states, negatives = pipe.encode_prompt("a red apple")
    long, long_negatives = torch.cat([states] * 3, dim=1), torch.cat([negatives] * 3, dim=1)
    with pytest.raises(ValueError, match="give negative_prompt_embeds of the same length"):
        pipe(prompt_embeds=long, num_inference_steps=2)
    out = pipe(prompt_embeds=long, negative_prompt_embeds=long_negatives, num_inference_steps=2, output_type="pt")
    assert out.images.isfinite().all()
    assert pipe(prompt_embeds=long, guidance_scale=1.0, num_inference_steps=2, output_type="pt").images.isfinite().all()


# Seams between components


def test_components_of_different_dtypes(pipe):
    """A float32 VAE decodes for a bfloat16 UNet, as the message about overflows advises; a float32 text encoder too."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    mixed = minidiff.StableDiffusionPipeline(**parts)
    mixed.set_progress_bar_config(disable=True)
    mixed.unet.to(torch.bfloat16)
    latents = draw(mixed, steps=2)
    assert latents.dtype == torch.bfloat16
    picture = draw(mixed, steps=2, output_type="pt")
    expected = minidiff.images.to_output(
        mixed.vae.decode(latents.float() / mixed.vae.config.scaling_factor).sample, "pt"
    )
    assert picture.dtype == torch.float32 and (picture - expected).abs().max() < 0.02  # latents rounded once more
    given = torch.randn(latents.shape, generator=seeded(), dtype=torch.float64)
    assert draw(mixed, steps=2, latents=given).dtype == torch.bfloat16


def test_components_on_different_devices(pipe):
    """The loop runs where the UNet is. The meta device, where nothing can be computed, stands for another one."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    apart = minidiff.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    apart.set_progress_bar_config(disable=True)
    states, negatives = apart.encode_prompt("a red apple")
    expected = draw(apart, steps=2)
    apart.text_encoder.to("meta")
    apart.vae.to("meta")
    given = {"prompt_embeds": states, "negative_prompt_embeds": negatives, "num_inference_steps": 2}
    assert apart(**given, generator=seeded(), output_type="latent").images.equal(expected)
    moved, decode = [], apart.vae.decode
    apart.vae.decode = lambda z: (moved.append(z.device.type), decode(z))[1]
    with pytest.raises((NotImplementedError, RuntimeError)):  # a picture of nothing
        apart(**given, generator=seeded())
    assert moved == ["meta"]


def test_numbers_of_any_integer_type(pipe):
    import numpy as np

    size = pipe.vae.factor * 4
    expected = draw(pipe, steps=2, height=size, width=size)
    assert draw(pipe, steps=np.int64(2), height=np.int64(size), width=torch.tensor(size)).equal(expected)
    with pytest.raises(TypeError, match=r"height must be an integer, but is 32\.0"):
        draw(pipe, height=32.0)


# Compilation


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_one_compilation_for_a_run(pipe, sampler):
    """The timestep reaches the network as a tensor: other steps, prompts and samplers of one shape compile nothing."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = with_sampler(pipe, sampler)
    expected = draw(compiled, steps=12)
    compiled.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    drawn = draw(compiled, steps=12)
    assert (drawn - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert counter.frame_count == 1
    compiled("a blue bird", num_inference_steps=7, output_type="latent")
    compiled.scheduler = minidiff.DDIMScheduler.from_config(compiled.scheduler.config)
    draw(compiled, steps=3)
    assert counter.frame_count == 1


def test_one_compilation_without_a_text(tiny_ddpm_folder):
    torch._dynamo.reset()
    counter = CompileCounter()
    pipe = minidiff.DDIMPipeline.from_pretrained(tiny_ddpm_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    pipe(num_inference_steps=12, output_type="np")
    assert counter.frame_count == 1


# What isn't there


@pytest.mark.parametrize("name", sorted({*minidiff.schedulers.__all__} - {*TEXT_SAMPLERS}))
def test_samplers_with_a_loop_of_their_own_say_so(pipe, name):
    other = minidiff.StableDiffusionPipeline(**{**pipe.components, "scheduler": getattr(minidiff, name)()})
    with pytest.raises(ValueError, match=f"scheduler is {name}, which "):
        draw(other)


def test_what_a_pipeline_hasnt(pipe):
    with pytest.raises(AttributeError, match="did you mean enable_vae_tiling"):
        pipe.enable_vae_tilling  # noqa: B018
    with pytest.raises(AttributeError, match="minidiff has no FreeU"):
        pipe.enable_freeu  # noqa: B018
    assert not hasattr(pipe, "anything_else")


def test_arguments_that_arent_there(pipe):
    with pytest.raises(TypeError, match=r".num_inference_step.*: did you mean num_inference_steps"):
        pipe("a red apple", num_inference_step=3)
    with pytest.raises(TypeError, match=r"'strength'.*: it takes prompt, height, width"):
        pipe("a red apple", strength=0.5)
    with pytest.raises(TypeError, match=r"missing .*'text_encoder': it takes vae, text_encoder"):
        minidiff.StableDiffusionPipeline(pipe.vae)


def test_what_is_inside(pipe):
    assert "unet: UNet2DConditionModel" in repr(pipe)
    assert pipe.config["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert pipe.config["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert repr(pipe.scheduler).startswith("PNDMScheduler(num_train_timesteps=1000")


# Memory


@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_draws_the_same(pipe, switch):
    """With a device that says where each module is: the CPU, since there is no other here; moves are counted."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    offloaded = minidiff.StableDiffusionPipeline(**parts)
    offloaded.set_progress_bar_config(disable=True)
    expected = draw(offloaded, output_type="pt")
    getattr(offloaded, switch)(device="cpu")
    moves, to = [], torch.nn.Module.to

    def counted(module, *args, **kwargs):
        moves.append((type(module).__name__, str(args[0])))
        return to(module, *args, **kwargs)

    torch.nn.Module.to = counted
    try:
        assert draw(offloaded, output_type="pt").equal(expected)
    finally:
        torch.nn.Module.to = to
    names = [name for name, _ in moves]
    if switch == "enable_model_cpu_offload":
        assert names == [
            "CLIPTextModel",
            "CLIPTextModel",
            "UNet2DConditionModel",
            "UNet2DConditionModel",
            "AutoencoderKL",
        ]
    else:
        assert names.count("Embedding") >= 2 and names.count("Conv2d") > 100
    with pytest.raises(ValueError, match="call remove_all_hooks first"):
        offloaded.to("cpu")
    offloaded.remove_all_hooks()
    moves.clear()
    assert draw(offloaded, output_type="pt").equal(expected) and not moves
    with pytest.raises(ValueError, match="device='quantum' can't be used here"):
        getattr(offloaded, switch)(device="quantum")


def test_methods_that_arent_there_are_told_on_classes_too():
    with pytest.raises(AttributeError, match="has no 'load_ip_adapter': minidiff has no IP-Adapter"):
        minidiff.StableDiffusionPipeline.load_ip_adapter  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean from_pretrained"):
        minidiff.AutoencoderKL.from_pretrain  # noqa: B018
    assert not hasattr(minidiff.DDIMScheduler, "anything_else")


def test_configs_alone(tmp_path):
    """Of a sampler and of a network; and what else a sampler's config makes."""
    scheduler = minidiff.DDIMScheduler(beta_start=0.001, clip_sample=False)
    scheduler.save_config(tmp_path / "scheduler")
    assert [file.name for file in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]
    values = minidiff.DDIMScheduler.load_config(tmp_path, subfolder="scheduler")
    assert values["_class_name"] == "DDIMScheduler" and values["beta_start"] == 0.001
    assert minidiff.DDIMScheduler.from_config(values, clip_sample=True).config.clip_sample is True
    assert minidiff.EulerDiscreteScheduler in scheduler.compatibles
    assert minidiff.RePaintScheduler not in scheduler.compatibles
    for cls in scheduler.compatibles:
        assert cls.from_config(scheduler.config).config.beta_start == 0.001
    vae = minidiff.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_config(tmp_path / "vae")
    made = minidiff.AutoencoderKL.from_config(minidiff.AutoencoderKL.load_config(tmp_path / "vae"))
    assert dict(made.config) == dict(vae.config)


def test_both_halves_returned_in_any_order(pipe):
    """`negative_prompt_embeds` are the first half of `prompt_embeds`, whichever of the two comes first."""
    states, negatives = pipe.encode_prompt("a red apple", None, 1, True, "blue")
    both = {"prompt_embeds": torch.cat([states, states]), "negative_prompt_embeds": negatives}
    drawn = [
        draw(pipe, steps=2, callback_on_step_end=lambda run, i, t, tensors, answer=answer: answer if i == 0 else None)
        for answer in (both, dict(reversed(both.items())))
    ]
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("name", TEXT_SAMPLERS)
def test_no_step_waits_for_the_device(tiny_sd_folder, name, monkeypatch):
    """On the meta device there is no value to read: what would wait for a GPU (`.item()`, `bool(x)`, `.tolist()`,
    `.cpu()`) fails. What is read after the last step is left out."""
    monkeypatch.setattr("minidiff.pipelines.denoise.check_finite", lambda finite, timesteps: None)
    meta = minidiff.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None).to("meta")
    meta.scheduler = getattr(minidiff, name).from_config(meta.scheduler.config)
    states = torch.empty(1, 16, 8, device="meta")
    options = {"prompt_embeds": states, "negative_prompt_embeds": states, "guidance_rescale": 0.7, "eta": 0.5}
    options |= {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    with warnings.catch_warnings(action="ignore"):  # of samplers that read no eta
        assert meta(**options).images.is_meta
        with pytest.raises(RuntimeError, match="meta"):  # it would be seen
            meta(**options, callback_on_step_end=lambda run, i, t, tensors: tensors["latents"].sum().item() and {})
