"""The samplers in the noise level (VE): Euler, Heun, LMS, KDPM2 and the ancestral ones, beside the reference's and
beside the mathematics."""

import functools
import inspect
import random
from fractions import Fraction

import diffusers
import numpy as np
import pytest
import torch
from sampler_parity import STABLE_DIFFUSION, compare_grid, compare_run, product

import minidiff as m
from minidiff.loading.config import ConfigError
from minidiff.schedulers.lms import adams_weights

EULER, HEUN, LMS = "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"
ANCESTRAL, KDPM2 = "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler"
KDPM2_ANCESTRAL = "KDPM2AncestralDiscreteScheduler"
TWO_STAGES = (HEUN, KDPM2, KDPM2_ANCESTRAL)
STOCHASTIC = (ANCESTRAL, KDPM2_ANCESTRAL)
NAMES = (EULER, ANCESTRAL, HEUN, LMS, KDPM2, KDPM2_ANCESTRAL)
STEPS = (1, 2, 3, 5, 10, 20, 50)

BETAS = ({"beta_start": 0.0001, "beta_end": 0.02}, STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"})
SPACINGS = (
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
)
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
GRIDS = ({}, KARRAS, EXPONENTIAL, {"use_beta_sigmas": True})
SAID = ("epsilon", "v_prediction")
SHORT = {"num_train_timesteps": 100, "beta_end": 0.2}  # the reference's KDPM2 needs a second to lay 1000 timesteps
SMALL = {name: SHORT if name.startswith("KDPM2") else {} for name in NAMES}
BASE = {"betas": BETAS, "prediction_type": SAID, "spacing": SPACINGS}
CONFIGS = {
    EULER: BASE
    | {
        "prediction_type": (*SAID, "sample"),
        "grid": (*GRIDS, KARRAS | {"sigma_min": 0.002, "sigma_max": 80.0}, {"interpolation_type": "log_linear"}),
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "rescale_betas_zero_snr": (False, True),
    },
    ANCESTRAL: BASE | {"rescale_betas_zero_snr": (False, True)},
    HEUN: BASE
    | {
        "betas": (*BETAS, {"beta_schedule": "exp"}),
        "prediction_type": (*SAID, "sample"),
        "grid": GRIDS,
        "clip": ({}, {"clip_sample": True, "clip_sample_range": 0.7}),
    },
    LMS: BASE | {"prediction_type": (*SAID, "sample"), "grid": GRIDS},
    KDPM2: BASE | {"grid": GRIDS, "short": (SHORT,)},
    KDPM2_ANCESTRAL: BASE | {"grid": GRIDS, "short": (SHORT,)},
}


def pair(name, **config):
    return getattr(m, name)(**config), getattr(diffusers, name)(**config)


def planned(name, n, **config):
    scheduler = getattr(m, name)(**config)
    scheduler.set_timesteps(n)
    return scheduler


def sampled(name, count, steps=STEPS):
    """Some of a sampler's configs, each with a number of steps."""
    runs = [(config, n) for config in product(**CONFIGS[name]) for n in steps]
    return random.Random(0).sample(runs, count)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Beside the reference's


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_references(name):
    ours, reference = getattr(m, name), getattr(diffusers, name)
    for method in ("set_timesteps", "step", "scale_model_input", "add_noise", "set_begin_index"):
        mine, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(cls, method)).parameters.values()]
            for cls in (ours, reference)
        )
        assert mine == theirs, method
    keys = {p.name: p.default for p in inspect.signature(reference).parameters.values()}
    assert dict(ours().config) == keys
    five = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert five == list(keys)[:5]
    assert ours(900, 0.001, 0.01, "scaled_linear").config.beta_schedule == "scaled_linear"
    assert ours.order == reference.order


@functools.cache
def lagrange_weights(sigmas):
    """The integral over the last interval of each Lagrange polynomial through the levels before it, without rounding.

    Levels are float32, so their polynomials' coefficients are fractions."""
    *nodes, end = map(Fraction, sigmas)
    weights = []
    for node in reversed(nodes):
        polynomial = [Fraction(1)]
        for other in nodes:
            if other != node:
                lower, higher = [-other * c for c in polynomial] + [0], [0, *polynomial]
                polynomial = [(a + b) / (node - other) for a, b in zip(lower, higher, strict=True)]
        powers = [(end**k - nodes[-1] ** k) / k for k in range(1, len(polynomial) + 1)]
        weights.append(float(sum(c * power for c, power in zip(polynomial, powers, strict=True))))
    return weights


def exact_lms(monkeypatch):
    """The reference's LMS with exact weights. Its own are integrals of a function computed in float32."""

    def weight(self, order, t, k):
        return lagrange_weights(tuple(self.sigmas[t - order + 1 : t + 2].tolist()))[k]

    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "get_lms_coefficient", weight)


def is_number(name, config, n):
    """Whether the reference gives one: it finds the level below the next one as the root of a difference, which rounds
    to 0 or below where the first step leads from sigma 20,000 or 4,096 to the last levels."""
    if name not in STOCHASTIC:
        return True
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(n)
    sigma, sigma_next = (scheduler.sigmas[i :: scheduler.order][:n] for i in (0, 1))
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    down = (sigma_next**2 - up**2) ** 0.5
    return bool((down[:-1] > 0).all()) if name == KDPM2_ANCESTRAL else bool(down.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_every_config_steps_as_the_reference(name, monkeypatch):
    """Measured: the same bits. 2e-7 for LMS, with the reference's weights made exact."""
    exact_lms(monkeypatch)
    compared = 0
    for config, n in sampled(name, 40):
        if is_number(name, config, n):
            grid = compare_grid(name, config, {"num_inference_steps": n})[0].timesteps.tolist()
            compare_run(name, config, n, by_index=grid.count(grid[0]) > 1)  # where the reference would begin later
            compared += 1
    assert compared >= 25


@pytest.mark.parametrize("name", NAMES)
def test_long_runs(name, monkeypatch):
    """Measured: the same bits. For LMS, the first steps, some midway and the last ones: 2e-7."""
    exact_lms(monkeypatch)
    config = STABLE_DIFFUSION | ({} if name == ANCESTRAL else KARRAS)
    for begin, end in ((0, 20), (500, 520), (980, 999)) if name == LMS else ((0, None),):
        assert compare_run(name, config, 999, begin=begin, end=end, by_index=True) == 0 or name == LMS


@pytest.mark.parametrize("grid", GRIDS)
def test_lms_weights_are_exact_and_the_references_nearly(grid):
    """Ours: 4e-15 of the largest weight. The reference's, as a float32 function's integral: 6e-7 up to 50 steps. At 999
    steps the levels' differences have few digits left there: 4e-4, of a step's thousandth part of the noise."""
    for betas in BETAS:
        reference = diffusers.LMSDiscreteScheduler(**betas, **grid)
        for n in (5, 50, 999):
            reference.set_timesteps(n)
            for i in (0, 1, 3, n // 2, n - 1):
                order = min(4, i + 1)
                sigmas = reference.sigmas[i - order + 1 : i + 2]
                exact, ours = np.array(lagrange_weights(tuple(sigmas.tolist()))), adams_weights(sigmas)
                np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-14 * abs(exact).max())
                if n <= 50:
                    theirs = [reference.get_lms_coefficient(order, i, k) for k in range(order)]
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * abs(exact).max())


@pytest.mark.parametrize("order", (1, 2, 3, 4, 5))
def test_lms_with_the_references_own_weights(order):
    """Measured: 6e-7."""
    for grid in GRIDS[:2]:
        for n in (1, 3, 10):
            compare_run(LMS, STABLE_DIFFUSION | grid, n, order=order)


def test_lms_of_another_order_in_each_step():
    ours, reference = pair(LMS)
    x = normal(0, 2, 3)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(9)
    for order, t in zip((4, 1, 2, 3, 2, 1, 3), ours.timesteps, strict=False):
        out = normal(int(order), 2, 3)
        got, want = ours.step(out, t, x, order=order)[0], reference.step(out, t, x, order=order)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype, monkeypatch):
    """The same roundings in the same order: the same bits, but one unit in the last place for LMS."""
    exact_lms(monkeypatch)
    for grid in ({},) if name == ANCESTRAL else ({}, KARRAS):
        for prediction_type in SAID:
            config = STABLE_DIFFUSION | grid | {"prediction_type": prediction_type} | SMALL[name]
            worst = compare_run(name, config, 10, dtype=dtype, bound=2 * torch.finfo(dtype).eps)
            assert worst == 0 or name == LMS


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_before_set_timesteps(name):
    for config in product(spacing=({}, *SPACINGS[::2]), grid=({},) if name == ANCESTRAL else GRIDS):
        ours, reference = pair(name, **config, **SMALL[name])
        assert ours.timesteps.tolist() == reference.timesteps.float().tolist()
        assert ours.sigmas.tolist() == reference.sigmas[: len(ours.sigmas)].tolist()
        assert ours.init_noise_sigma == reference.init_noise_sigma
    assert len(getattr(m, name)(timestep_spacing="leading", steps_offset=1)) == 1000  # a place beyond the training's


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_index", (False, True))
def test_a_run_begins_midway(name, by_index, monkeypatch):
    """By the timestep, of which Heun's stands twice, or by set_begin_index. LMS has one slope and weights for four."""
    exact_lms(monkeypatch)
    order = getattr(m, name).order
    for config, n in ((STABLE_DIFFUSION, 10), ({"timestep_spacing": "leading", "steps_offset": 1}, 20)):
        for begin in (order, 4 * order, (n - 1) * order):
            compare_run(name, config | SMALL[name], n, begin=begin, by_index=by_index)


@pytest.mark.parametrize("name", TWO_STAGES)
def test_a_run_cannot_begin_between_two_stages(name):
    """The reference then takes every interval's length for 0, and gives the sample back as it was."""
    scheduler, x = getattr(m, name)(), normal(0, 2, 3)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="begins at place 3, between the two stages of an interval"):
        scheduler.step(x, scheduler.timesteps[3], x)


CUSTOM = [999, 850.5, 736, 501, 24]


@pytest.mark.parametrize("name", (EULER, HEUN))
def test_custom_timesteps(name):
    for timesteps in (CUSTOM, [7], np.array([700, 3]), torch.tensor([5, 1])):
        for prediction_type in SAID:
            compare_run(name, STABLE_DIFFUSION | {"prediction_type": prediction_type}, {"timesteps": timesteps})
    with pytest.raises(ValueError, match="use_karras_sigmas is true and chooses them"):
        getattr(m, name)(use_karras_sigmas=True).set_timesteps(timesteps=CUSTOM)
    with pytest.raises(ValueError, match="in descending order"):
        getattr(m, name)().set_timesteps(timesteps=[1, 2])
    for plan in ({}, {"num_inference_steps": 3, "timesteps": CUSTOM}):
        with pytest.raises(ValueError, match="give one of num_inference_steps, timesteps"):
            getattr(m, name)().set_timesteps(**plan)


def test_eulers_custom_sigmas():
    for sigmas in ([14.6, 7.1, 2.22, 0.31, 0.0], [80.0, 3.0, 0.4], np.array([9.0, 0.1]), torch.tensor([1.5, 0.0])):
        for config in ({}, KARRAS, {"prediction_type": "v_prediction", "timestep_type": "continuous"}):
            compare_run(EULER, STABLE_DIFFUSION | config, {"sigmas": sigmas})
    for sigmas in ([1.0], [], [1.0, 2.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="sigmas=.*in descending order, 0 or more, and at least 2"):
            m.EulerDiscreteScheduler().set_timesteps(sigmas=sigmas)
    continuous = m.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    with pytest.raises(ValueError, match="timestep_type='continuous' derives them"):
        continuous.set_timesteps(timesteps=CUSTOM)


@pytest.mark.parametrize("name", TWO_STAGES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_fewer_training_timesteps(name, spacing):
    for n in (1, 3, 10):
        compare_run(name, SHORT | spacing, {"num_inference_steps": n, "num_train_timesteps": 40})
    with pytest.raises(ValueError, match=r"num_train_timesteps=1001 must lie in 1..1000"):
        getattr(m, name)().set_timesteps(3, num_train_timesteps=1001)


@pytest.mark.parametrize("s_churn", (0.0, 1.0, 5.0, 100.0))
@pytest.mark.parametrize("config", ({}, KARRAS, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}))
def test_eulers_churn(config, s_churn):
    for options in ({}, {"s_tmin": 0.5, "s_tmax": 10.0, "s_noise": 1.007}, {"s_tmin": 20.0}):
        compare_run(EULER, STABLE_DIFFUSION | config, 10, s_churn=s_churn, **options)
        for dtype in (torch.float16, torch.bfloat16):
            bound = 2 * torch.finfo(dtype).eps
            compare_run(EULER, STABLE_DIFFUSION | config, 5, s_churn=s_churn, dtype=dtype, bound=bound, **options)


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_scaled_input(name):
    """Before a run and with no begin_index by the timestep; with one by the place, whatever the timestep."""
    x0, eps = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    for grid in ({},) if name == ANCESTRAL else ({}, KARRAS, EXPONENTIAL):
        for dtype in (torch.float32, torch.float16, torch.float64):
            both = pair(name, **(STABLE_DIFFUSION | grid | SMALL[name]))

            def equal(do, both=both):
                ours, reference = (do(scheduler) for scheduler in both)
                assert ours.dtype == reference.dtype and torch.equal(ours, reference)

            def noised(scheduler, *places, dtype=dtype):
                return scheduler.add_noise(x0.to(dtype), eps.to(dtype), scheduler.timesteps[list(places)])

            equal(lambda s: noised(s, 0, 90))
            for scheduler in both:
                scheduler.set_timesteps(7)
            equal(lambda s: noised(s, 2, 6))
            equal(lambda s: s.add_noise(x0[:1], eps[:1], s.timesteps[1:2]))
            for scheduler in both:
                scheduler.set_begin_index(4)
            equal(lambda s: noised(s, 0, 1))
            equal(lambda s, dtype=dtype: s.scale_model_input(x0.to(dtype), s.timesteps[4]))
            for scheduler in both:
                scheduler.step(eps, scheduler.timesteps[4], x0)
            equal(lambda s: noised(s, 0, 1))
            equal(lambda s, dtype=dtype: s.scale_model_input(x0.to(dtype), s.timesteps[0]))


def test_eulers_velocity_is_the_references_and_the_others_right():
    """The reference looks the place in the grid up in the table of alpha_bar, which runs the other way. Right is what
    DDIM says at that timestep. Only Euler has the method there."""
    x0, eps = normal(0, 3, 4), normal(1, 3, 4)
    ours, reference = pair(EULER, **STABLE_DIFFUSION)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(11)
    t = reference.timesteps[[0, 3, 10]]
    got, want = ours.get_velocity(x0, eps, t), reference.get_velocity(x0, eps, t)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    ours, ddim = m.LMSDiscreteScheduler(timestep_spacing="trailing"), m.DDIMScheduler()
    ours.set_timesteps(10)
    t = ours.timesteps[[0, 3, 9]]
    got, want = ours.get_velocity(x0, eps, t), ddim.get_velocity(x0, eps, t.long())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_step_returns(name):
    scheduler, x = getattr(m, name)(), normal(0, 2, 3)
    for return_dict in (True, False):
        scheduler.set_timesteps(3)
        out = scheduler.step(x, scheduler.timesteps[0], x, return_dict=return_dict)
        assert type(out) is tuple or (out.prev_sample is out[0] and out["pred_original_sample"] is out[1])
        assert len(out) == 2


# What can't be


@pytest.mark.parametrize(
    ("name", "config", "message"),
    (
        (EULER, KARRAS | EXPONENTIAL, "use_exponential_sigmas=True is not supported: it must be false beside"),
        (EULER, {"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min=3.0 is not supported: it must be less than sigma_max"),
        (EULER, {"sigma_min": 0.0}, "sigma_min=0.0 is not supported"),
        (EULER, {"interpolation_type": "cubic"}, "interpolation_type='cubic' is not supported"),
        (EULER, {"beta_schedule": "exp"}, "beta_schedule='exp' is not supported"),
        (HEUN, {"clip_sample_range": "x"}, "clip_sample_range='x' is not supported"),
        (LMS, {"timestep_spacing": "even"}, "timestep_spacing='even' is not supported"),
    ),
)
def test_configs_that_cannot_be(name, config, message):
    with pytest.raises(ConfigError, match=message):
        getattr(m, name)(**config)


def test_steps_that_cannot_be_taken():
    scheduler, x = m.LMSDiscreteScheduler(), normal(0, 2, 3)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(2)
    for order, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"order.*{order}"):
            scheduler.step(x, 999.0, x, order=order)
    with pytest.raises(ValueError, match="timestep=5 is none of those"):
        planned(HEUN, 3).step(x, 5, x)
    scheduler = planned(HEUN, 3)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    for call in (lambda: scheduler.step(x, 0.0, x), lambda: scheduler.scale_model_input(x, 0.0)):
        with pytest.raises(ValueError, match="step 6 of 5: the run is over"):
            call()
