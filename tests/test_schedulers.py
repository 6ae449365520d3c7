"""The schedulers beside the reference's, on the same model outputs: equal tables, timesteps, samples, random draws."""

import inspect
import itertools
import json
import random

import diffusers
import numpy as np
import pytest
import torch

import minidiff.schedulers as ours
from minidiff.loading.config import ConfigError
from minidiff.noise import randn_tensor

NAMES = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
BOUND = 1e-6  # of the largest value of prev_sample; measured: 0 nearly everywhere, 1e-7 in PNDM's third step
SPACINGS = ("leading", "trailing", "linspace")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
X0_BOUNDS = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DEFAULT = {"PNDMScheduler": {"skip_prk_steps": True}}


def pair(name, **config):
    return getattr(ours, name)(**config), getattr(diffusers, name)(**config)


def product(**axes):
    """Every combination of the axes' values; a value that is a dict brings several keys."""
    for values in itertools.product(*axes.values()):
        config = {}
        for key, value in zip(axes, values, strict=True):
            config.update(value if isinstance(value, dict) else {key: value})
        yield config


def sampled(configs, count):
    configs = list(configs)
    return random.Random(0).sample(configs, min(count, len(configs)))


def model_output(scheduler, shape, generator, dtype=torch.float32):
    """What a model could say: noise, and variances beside it that are positive and in learned_range's range."""
    output = torch.randn(shape, generator=generator)
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        output = torch.cat([output, torch.rand(shape, generator=generator)], dim=1)
    return output.to(dtype)


def compare_run(name, config, steps, *, set_timesteps=None, dtype=torch.float32, bound=BOUND, **step_arguments):
    """Both through all timesteps, each on its own samples. Returns how many steps were compared.

    Where the reference divides by an alpha_bar of 0 there is an error instead, before the first step.
    """
    mine, reference = pair(name, **config)
    plan = set_timesteps or {"num_inference_steps": steps}
    reference.set_timesteps(**plan)
    bounded = mine.config.get("clip_sample") and not mine.config.get("thresholding")
    signal = reference.alphas_cumprod[reference.timesteps].min() > 0
    if config.get("prediction_type", "epsilon") == "epsilon" and not (signal or bounded):
        with pytest.raises(ValueError, match=r"alpha_bar is 0 at timestep 999.*prediction_type='epsilon'"):
            mine.set_timesteps(**plan)
        return 0
    mine.set_timesteps(**plan)
    assert mine.timesteps.tolist() == reference.timesteps.tolist()
    assert mine.timesteps.dtype == reference.timesteps.dtype == torch.int64
    noise = torch.Generator().manual_seed(0)
    sample = expected = torch.randn(2, 3, 3, 2, generator=noise).to(dtype)
    draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    for t in reference.timesteps:
        output = model_output(mine, sample.shape, noise, dtype)
        if name == "PNDMScheduler":
            got, want = mine.step(output, t, sample), reference.step(output, t, expected)
        else:
            got = mine.step(output, t, sample, generator=draws[0], **step_arguments)
            want = reference.step(output, t, expected, generator=draws[1], **step_arguments)
            assert draws[0].get_state().equal(draws[1].get_state())
        assert want.prev_sample.isfinite().all()
        sample, expected = got.prev_sample, want.prev_sample
        assert sample.dtype == expected.dtype
        assert (sample - expected).abs().max() <= bound * expected.abs().max(), f"timestep {t} of {config}"
        if name != "PNDMScheduler":
            difference = (got.pred_original_sample - want.pred_original_sample).abs().max()
            assert difference <= bound * want.pred_original_sample.abs().max()
    return len(reference.timesteps)


# The public surface


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_references(name):
    mine, reference = getattr(ours, name), getattr(diffusers, name)
    for ours_, theirs in (
        (mine, reference),
        (mine.step, reference.step),
        (mine.set_timesteps, reference.set_timesteps),
    ):
        parameters, expected = inspect.signature(ours_).parameters, inspect.signature(theirs).parameters
        named = [key for key in parameters if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY]
        assert named == list(expected)[: len(named)] and parameters.keys() == expected.keys()
        for key, parameter in parameters.items():
            assert parameter.default in (expected[key].default, inspect.Parameter.empty)
    scheduler, expected = pair(name)
    assert len(scheduler) == len(expected) == 1000
    assert (scheduler.order, scheduler.init_noise_sigma) == (expected.order, expected.init_noise_sigma)
    assert scheduler.num_inference_steps is expected.num_inference_steps is None
    if name == "PNDMScheduler":
        assert scheduler.timesteps is expected.timesteps is None
    else:
        assert scheduler.timesteps.equal(expected.timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_step_returns_a_tuple_on_request(name):
    scheduler, reference = pair(name, **DEFAULT.get(name, {}))
    sample = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for one in (scheduler, reference):
        one.set_timesteps(2)
        results.append(one.step(sample, 0, sample, return_dict=False))
    assert type(results[0]) is tuple and len(results[0]) == len(results[1])
    assert all(got.equal(want) for got, want in zip(*results, strict=True))
    assert scheduler.scale_model_input(sample, 0) is sample


# Tables and timesteps


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_equal(name):
    schedules = SCHEDULES + (("sigmoid", "laplace") if name == "DDPMScheduler" else ())
    zero_snr = {"rescale_betas_zero_snr": (False, True)} if name != "PNDMScheduler" else {}
    final = {"set_alpha_to_one": (False, True)} if name != "DDPMScheduler" else {}
    betas = {"trained_betas": (None, np.linspace(0.001, 0.03, 1000))}
    ranges = {"range": ({}, {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 100})}
    for config in product(beta_schedule=schedules, **zero_snr, **final, **betas, **ranges):
        mine, reference = pair(name, **config)
        assert mine.betas.dtype == torch.float32
        assert mine.betas.equal(reference.betas)
        assert mine.alphas.equal(reference.alphas)
        assert mine.alphas_cumprod.equal(reference.alphas_cumprod)
        assert mine.final_alpha_cumprod.equal(getattr(reference, "final_alpha_cumprod", torch.tensor(1.0)))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_timesteps_are_equal_for_every_number_of_steps(name, spacing):
    """Or a clear error, where the reference's timesteps leave its tables: 1000 fails in them, -1 wraps around."""
    errors = 0
    for offset in (0, 1, 5) if spacing == "leading" else (0,):
        mine, reference = pair(name, timestep_spacing=spacing, steps_offset=offset, **DEFAULT.get(name, {}))
        for n in range(1, 1001):
            reference.set_timesteps(n)
            if reference.timesteps.min() < 0 or reference.timesteps.max() > 999:
                errors += 1
                with pytest.raises(ValueError, match=f"num_inference_steps={n} .* take another number of steps"):
                    mine.set_timesteps(n)
            else:
                mine.set_timesteps(n)
                assert mine.timesteps.equal(reference.timesteps)
                assert mine.num_inference_steps == n
    assert errors == {"leading": 11, "trailing": 62, "linspace": 0}[spacing]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_prk_timesteps_are_equal(spacing):
    mine, reference = pair("PNDMScheduler", timestep_spacing=spacing)
    for n in (*range(4, 60), 99, 100, 333, 500, 999, 1000):
        reference.set_timesteps(n)
        mine.set_timesteps(n)
        for key in ("timesteps", "prk_timesteps", "plms_timesteps"):
            assert list(getattr(mine, key)) == list(getattr(reference, key))


# Steps


def grid(name):
    common = {"beta_schedule": SCHEDULES, "timestep_spacing": SPACINGS, "steps_offset": (0, 1)}
    if name == "PNDMScheduler":
        prediction = ("epsilon", "v_prediction")
        alpha = {"set_alpha_to_one": (False, True), "skip_prk_steps": (False, True)}
        return list(product(prediction_type=prediction, **alpha, **common))
    common |= {"rescale_betas_zero_snr": (False, True), "bound": X0_BOUNDS}
    common |= {"prediction_type": ("epsilon", "sample", "v_prediction")}
    if name == "DDIMScheduler":
        return sampled(product(set_alpha_to_one=(False, True), **common), 400)
    common["beta_schedule"] += ("sigmoid", "laplace")
    variances = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None)
    return sampled(product(variance_type=variances, **common), 400)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_steps_as_the_reference(name):
    compared = 0
    for number, config in enumerate(grid(name)):
        steps = (4, 5, 7, 10)[number % 4]
        arguments = {}
        if name == "DDIMScheduler":
            arguments = {"eta": (0.0, 0.4)[number % 2], "use_clipped_model_output": number % 3 == 0}
        compared += compare_run(name, config, steps, **arguments)
    assert compared > {"DDPMScheduler": 2000, "DDIMScheduler": 2000, "PNDMScheduler": 1000}[name]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 50, 333, 999, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps(name, steps):
    configs = [{**STABLE_DIFFUSION, **DEFAULT.get(name, {}), "steps_offset": int(steps < 1000)}]
    if steps < 333:  # float steps round to a timestep too many for some counts, an error that is tested above
        configs.append({"timestep_spacing": "trailing", **DEFAULT.get(name, {})})
    if name == "PNDMScheduler" and steps >= 4:
        configs.append({"timestep_spacing": "linspace", "set_alpha_to_one": True})
    for config in configs:
        assert compare_run(name, config, steps) >= steps


def test_ddim_with_the_noise_of_ddpm():
    assert compare_run("DDIMScheduler", {"clip_sample": False}, 50, eta=1.0) == 50
    assert compare_run("DDIMScheduler", STABLE_DIFFUSION, 10, eta=0.5, use_clipped_model_output=True) == 10


def test_ddim_takes_the_noise_it_is_given():
    mine, reference = pair("DDIMScheduler")
    generator = torch.Generator().manual_seed(0)
    sample, eps, noise = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(3))
    for one in (mine, reference):
        one.set_timesteps(10)
    got = mine.step(eps, 500, sample, eta=0.7, variance_noise=noise).prev_sample
    assert got.equal(reference.step(eps, 500, sample, eta=0.7, variance_noise=noise).prev_sample)
    assert not got.equal(mine.step(eps, 500, sample, eta=0.7, variance_noise=-noise).prev_sample)


def test_ddim_stays_finite_where_rounding_leaves_less_than_no_variance():
    """From zero SNR with eta 1 all noise is new. What remains is 0, or -6e-8, whose root is the reference's NaN."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    mine, reference = pair("DDIMScheduler", **config)
    sample = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    rescued = 0
    for n in range(2, 50):
        for one in (mine, reference):
            one.set_timesteps(n)
        noise = {"eta": 1.0, "variance_noise": sample}
        got = mine.step(sample, 999, sample, **noise).prev_sample
        want = reference.step(sample, 999, sample, **noise).prev_sample
        assert got.isfinite().all()
        if want.isfinite().all():
            assert got.equal(want)
        else:
            rescued += 1
    assert 0 < rescued < 48


def test_ddpm_walks_its_whole_chain_before_set_timesteps():
    mine, reference = pair("DDPMScheduler")
    generator = torch.Generator().manual_seed(0)
    draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    sample, eps = (torch.randn(1, 3, 2, 2, generator=generator) for _ in range(2))
    for t in (999, 500, 1, 0):
        got = mine.step(eps, t, sample, generator=draws[0]).prev_sample
        assert got.equal(reference.step(eps, t, sample, generator=draws[1]).prev_sample)
        assert mine.previous_timestep(t) == reference.previous_timestep(t) == t - 1


@pytest.mark.parametrize("timesteps", [[999, 850, 736, 24], [0], [10, 9, 8], np.array([700, 3]), torch.tensor([5, 1])])
def test_ddpm_takes_custom_timesteps(timesteps):
    assert compare_run("DDPMScheduler", {}, None, set_timesteps={"timesteps": timesteps}) == len(timesteps)
    mine, reference = pair("DDPMScheduler")
    for one in (mine, reference):
        one.set_timesteps(timesteps=timesteps)
    for t in mine.timesteps:
        assert mine.previous_timestep(t) == mine.previous_timestep(int(t)) == reference.previous_timestep(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_bit_equal(name, dtype):
    configs = [{}] if name == "PNDMScheduler" else [{"clip_sample": False}, X0_BOUNDS[2], {"prediction_type": "sample"}]
    if name == "DDPMScheduler":
        configs += [{"variance_type": "learned_range"}, {"variance_type": "learned"}]
    for config in configs:
        arguments = {"eta": 0.5} if name == "DDIMScheduler" else {}
        bound = 1e-15 if dtype == torch.float64 and name == "PNDMScheduler" else 0
        assert compare_run(name, config, 12, dtype=dtype, bound=bound, **arguments) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_value_of_the_sample(name):
    """On the meta device there is none to read: a step waits for no device, whatever its timestep's and noise's own."""
    scheduler = getattr(ours, name)(**DEFAULT.get(name, {}))
    scheduler.set_timesteps(5)
    sample = torch.empty(2, 3, 2, 2, device="meta", dtype=torch.float16)
    noise = {} if name == "PNDMScheduler" else {"generator": [torch.Generator(), torch.Generator()]}
    for t in scheduler.timesteps.tolist():
        output = scheduler.step(sample, t, sample, **noise)
        assert output.prev_sample.device.type == "meta" and output.prev_sample.dtype == torch.float16
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"


# The forward process


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_velocity_are_bit_equal(name, dtype):
    """In half precision the table is cast last. The reference casts it first, which leaves no noise at timestep 0."""
    mine, reference = pair(name)
    half = dtype in (torch.float16, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 2, 2, generator=generator).to(dtype) for _ in range(2))
    for timesteps in (torch.tensor([0, 17, 500, 999]), torch.tensor([3], dtype=torch.int32), torch.tensor(7)):
        for method in ("add_noise", "get_velocity"):
            if hasattr(reference, method):
                got = getattr(mine, method)(x0, noise, timesteps)
                assert got.dtype == dtype
                wide = torch.float32 if half else dtype
                expected = getattr(reference, method)(x0.to(wide), noise.to(wide), timesteps)
                # measured: 1.2 epsilons of the dtype, from three roundings
                within = 1.5 * torch.finfo(dtype).eps if half else 0
                assert ((got - expected).abs() <= within * expected.abs().max()).all()
    several = torch.tensor([1, 2, 3, 4])
    if half:
        return
    assert mine.add_noise(x0[:1], noise, several).equal(reference.add_noise(x0[:1], noise, several))
    flat = torch.randn(4, 6, generator=generator).to(dtype)
    assert mine.add_noise(flat, flat, several).equal(reference.add_noise(flat, flat, several))


# Randomness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_is_the_references(dtype):
    reference = diffusers.utils.torch_utils.randn_tensor

    def generators(count):
        return [torch.Generator().manual_seed(seed) for seed in range(count)]

    for make in (lambda: generators(1)[0], lambda: generators(1), lambda: generators(3)):
        got = randn_tensor((3, 2, 5), make(), device="cpu", dtype=dtype)
        assert got.dtype == dtype
        assert got.equal(reference((3, 2, 5), make(), device="cpu", dtype=dtype))
    alone = randn_tensor((1, 2, 5), generators(3)[2], dtype=dtype)
    assert alone.equal(randn_tensor((3, 2, 5), generators(3), dtype=dtype)[2:])
    torch.manual_seed(0)
    unseeded = randn_tensor(torch.Size((3, 2)), dtype=dtype)
    torch.manual_seed(0)
    assert unseeded.equal(reference((3, 2), dtype=dtype))
    assert randn_tensor((3, 2), generators(1)[0], device="meta").device.type == "meta"


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_a_generator_a_sample(name):
    eta = {"eta": 0.8} if name == "DDIMScheduler" else {}
    mine, reference = pair(name)
    sample = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for one in (mine, reference):
        one.set_timesteps(10)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 7, 0)]
        results.append(one.step(sample, 500, sample, generator=generators, **eta).prev_sample)
    assert results[0].equal(results[1])
    alone = mine.step(sample[1:2], 500, sample[1:2], generator=torch.Generator().manual_seed(7), **eta).prev_sample
    assert alone.equal(results[0][1:2])


# Configs


@pytest.mark.parametrize(
    "path", list(itertools.product(NAMES, repeat=3)), ids=lambda path: "-".join(n[:4] for n in path)
)
def test_swapping_classes_keeps_what_the_reference_keeps(path):
    """Named keys travel, through classes that don't read them too; defaulted keys stay behind."""
    first = {"PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True}}.get(
        path[0], {"clip_sample": False, "rescale_betas_zero_snr": True, "clip_sample_range": 2.0}
    )
    mine, reference = pair(path[0], **STABLE_DIFFUSION, **first)
    for name in path[1:]:
        theirs = getattr(diffusers, name).from_config(reference.config)
        from_theirs = getattr(ours, name).from_config(reference.config)
        mine, reference = getattr(ours, name).from_config(mine.config), theirs
        expected = {key: value for key, value in reference.config.items() if not key.startswith("_")}
        assert dict(mine.config) == dict(from_theirs.config) == expected
        assert set(mine.config) - set(mine.config.explicit()) == set(reference.config["_use_default_values"])
        assert mine.betas.equal(reference.betas)
    overridden = getattr(ours, path[0]).from_config(mine.config, steps_offset=3, timestep_spacing="trailing")
    assert (overridden.config.steps_offset, overridden.config.timestep_spacing) == (3, "trailing")


@pytest.mark.parametrize(
    "other",
    [
        "DDIM",
        "DDPM",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "EDMEuler",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "LCM",
        "PNDM",
        "TCD",
        "UniPCMultistep",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_compatible_scheduler_are_read(name, other):
    """A file names every key. DPM-Solver's `"variance_type": null` is among them."""
    file = json.loads(getattr(diffusers, f"{other}Scheduler")().to_json_string())
    mine = getattr(ours, name).from_config(file)
    reference = getattr(diffusers, name).from_config(file)
    assert dict(mine.config) == {key: value for key, value in reference.config.items() if not key.startswith("_")}
    again = getattr(ours, name).from_config(json.loads(json.dumps(dict(mine.config))))
    assert dict(again.config) == dict(mine.config)
    assert mine.betas.equal(reference.betas)


def test_two_schedulers_share_no_state():
    for name in NAMES:
        config = DEFAULT.get(name, {})
        one, other = getattr(ours, name)(**config), getattr(ours, name)(**config)
        sample = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))

        def first_step(scheduler, sample=sample):
            seed = {} if isinstance(scheduler, ours.PNDMScheduler) else {"generator": torch.Generator().manual_seed(0)}
            return scheduler.step(sample, scheduler.timesteps[0], sample, **seed).prev_sample

        one.set_timesteps(10)
        other.set_timesteps(10)
        expected = first_step(one)
        for t in one.timesteps[1:7]:
            one.step(sample * 2, t, sample)
        assert first_step(other).equal(expected)
        one.betas.zero_()
        assert getattr(ours, name)(**config).betas.equal(other.betas)


@pytest.mark.parametrize("skip_prk_steps", [False, True])
@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 13, 20])
def test_set_timesteps_clears_pndm(skip_prk_steps, interrupted_after):
    eps = torch.randn(30, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))

    def run(scheduler, steps):
        scheduler.set_timesteps(12)
        sample = eps[-1]
        for t, output in zip(scheduler.timesteps[:steps], eps, strict=False):
            sample = scheduler.step(output, t, sample).prev_sample
        return sample

    used = ours.PNDMScheduler(skip_prk_steps=skip_prk_steps)
    run(used, interrupted_after)
    assert run(used, 99).equal(run(ours.PNDMScheduler(skip_prk_steps=skip_prk_steps), 99))


# Errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key, value",
    [
        ("beta_schedule", "cosine"),
        ("prediction_type", "flow"),
        ("timestep_spacing", "even"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10.5),
        ("beta_start", -0.1),
        ("beta_end", 1.5),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [2.0] * 1000),
        ("steps_offset", "1"),
    ],
)
def test_a_value_that_is_not_supported_is_named(name, key, value):
    with pytest.raises(ConfigError, match=key):
        getattr(ours, name)(**{key: value})


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("PNDMScheduler", "beta_schedule", "laplace"),
        ("DDPMScheduler", "variance_type", "fixed_medium"),
        ("DDIMScheduler", "dynamic_thresholding_ratio", 1.5),
    ],
)
def test_a_value_of_another_class_is_named(name, key, value):
    with pytest.raises(ConfigError, match=key):
        getattr(ours, name)(**{key: value})


@pytest.mark.parametrize(
    "name, key",
    [("DDPMScheduler", "set_alpha_to_one"), ("DDIMScheduler", "variance_type"), ("PNDMScheduler", "clip_sample")],
)
def test_a_key_of_another_class_is_no_argument(name, key):
    with pytest.raises(ConfigError, match=f"{name} has no {key}; its keys: beta_end"):
        getattr(ours, name)(**{key: True})
    with pytest.raises(ConfigError, match=f"{name} has no {key}"):
        getattr(ours, name).from_config({}, **{key: True})
    with pytest.raises(ConfigError, match="beta_strat"):
        getattr(ours, name).from_config({"beta_strat": 0.1})
    with pytest.raises(TypeError, match="config"):
        getattr(ours, name).from_config("folder")


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_cannot_be_planned(name):
    scheduler = getattr(ours, name)(**DEFAULT.get(name, {}))
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} must lie in 1..1000"):
            scheduler.set_timesteps(steps)
    for steps in (10.0, "10", [10]):
        with pytest.raises(TypeError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps is None
    with pytest.raises((TypeError, ValueError), match="num_inference_steps"):
        scheduler.set_timesteps(None)


def test_prk_needs_four_steps_as_in_the_reference():
    mine, reference = pair("PNDMScheduler")
    for steps in (1, 2, 3):
        with pytest.raises(ValueError):
            reference.set_timesteps(steps)
        with pytest.raises(ValueError, match=f"num_inference_steps={steps} must be at least 4"):
            mine.set_timesteps(steps)


@pytest.mark.parametrize(
    "timesteps, error",
    [
        ([], "descending order, and at least one"),
        ([1, 1], "descending order"),
        ([1, 2], "descending order"),
        ([1000], "lie in 0..999"),
        ([3, -1], "lie in 0..999"),
        ([5.5], "must be an integer, but is 5.5"),
    ],
)
def test_custom_timesteps_that_cannot_be(timesteps, error):
    scheduler = ours.DDPMScheduler()
    with pytest.raises((ValueError, TypeError), match=rf"timesteps.*{error}"):
        scheduler.set_timesteps(timesteps=timesteps)
    with pytest.raises(ValueError, match="either num_inference_steps or timesteps"):
        scheduler.set_timesteps(10, timesteps=[3, 2])


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_cannot_be_taken(name):
    scheduler = getattr(ours, name)(**DEFAULT.get(name, {}))
    sample = torch.zeros(1, 3, 2, 2)
    if name != "DDPMScheduler":
        with pytest.raises(ValueError, match="call set_timesteps"):
            scheduler.step(sample, 0, sample)
    scheduler.set_timesteps(10)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=f"timestep={t} must lie in 0..999"):
            scheduler.step(sample, t, sample)
    for t in (1.0, None, torch.tensor([1, 2]), torch.tensor(1.0)):
        with pytest.raises(TypeError, match="timestep"):
            scheduler.step(sample, t, sample)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 0, sample)
    with pytest.raises(TypeError, match="model_output"):
        scheduler.step(None, 0, sample)
    with pytest.raises(TypeError, match="sample"):
        scheduler.step(sample, 0, [0.0])


def test_ddpm_step_errors():
    sample = torch.zeros(1, 3, 2, 2)
    scheduler = ours.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"model_output has 3 channels.*needs 6"):
        scheduler.step(sample, 5, sample)
    with pytest.raises(ValueError, match="model_output"):
        ours.DDPMScheduler().step(torch.zeros(1, 6, 2, 2), 5, sample)
    scheduler = ours.DDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep=5 is none of those"):
        scheduler.step(sample, 5, sample)


def test_fixed_large_log_is_an_error_where_the_reference_gives_nan():
    mine, reference = pair("DDPMScheduler", variance_type="fixed_large_log")
    sample = torch.zeros(1, 3, 2, 2)
    assert reference.step(sample, 5, sample).prev_sample.isnan().all()
    with pytest.raises(ValueError, match="fixed_large_log"):
        mine.step(sample, 5, sample)
    assert mine.step(sample, 0, sample).prev_sample.equal(reference.step(sample, 0, sample).prev_sample)


def test_ddim_step_errors():
    sample = torch.zeros(1, 3, 2, 2)
    scheduler = ours.DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta=-0\.1"):
        scheduler.step(sample, 500, sample, eta=-0.1)
    with pytest.raises(ValueError, match="eta=9 is too large"):
        scheduler.step(sample, 500, sample, eta=9)
    with pytest.raises(ValueError, match="variance_noise"):
        scheduler.step(sample, 500, sample, eta=1.0, variance_noise=sample, generator=torch.Generator())


def test_plms_needs_prk_first():
    scheduler = ours.PNDMScheduler()
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match="step_prk"):
        scheduler.step_plms(sample, 900, sample)
    scheduler = ours.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="step_prk has 0 stages"):
        scheduler.step_prk(sample, 900, sample)


def test_forward_process_errors():
    scheduler = ours.DDPMScheduler()
    x0 = torch.zeros(2, 3, 2, 2)
    for timesteps in (torch.tensor([-1]), torch.tensor([1000]), torch.tensor([1, 2, 3])):
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.add_noise(x0, x0, timesteps)
    for timesteps in (torch.tensor([1.0]), 5, torch.tensor([True])):
        with pytest.raises(TypeError, match="timesteps"):
            scheduler.get_velocity(x0, x0, timesteps)


def test_generators_that_cannot_draw():
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=f"generator is a list of {count}, but the batch has 3"):
            randn_tensor((3, 2), [torch.Generator() for _ in range(count)])
    for generator in (42, [torch.Generator(), None, None]):
        with pytest.raises(TypeError, match="generator"):
            randn_tensor((3, 2), generator)
