"""The samplers in the noise level (VE): Euler, Heun, LMS, KDPM2 and the ancestral ones, beside the reference's and
beside the mathematics."""

import copy
import functools
import inspect
import math
import random
from fractions import Fraction
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from sampler_parity import STABLE_DIFFUSION, compare_grid, compare_run, product
from test_properties_schedulers import COVARIANCE, FINE, MEAN, Gaussian, Mixture, check_moments

import minidiff as m
from minidiff.loading.config import ConfigError
from minidiff.schedulers import euler_ancestral, kdpm2_ancestral
from minidiff.schedulers.lms import adams_weights
from minidiff.schedulers.sigma import ancestral

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
SHORT = {"num_train_timesteps": 100, "beta_end": 0.2}  # the reference needs up to a second to lay 1000
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
        "short": (SHORT,),
    },
    LMS: BASE | {"prediction_type": (*SAID, "sample"), "grid": GRIDS, "short": (SHORT,)},
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
    assert ours.order == reference.order


@pytest.mark.parametrize("name", (*NAMES, "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"))
def test_the_first_five_keys_may_stand_by_position(name):
    """Also where a class has another default or hint for one of them."""
    ours, reference = getattr(m, name), getattr(diffusers, name)
    five = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert five == list(inspect.signature(reference).parameters)[:5]
    values = (3, 0.001, 0.01, "scaled_linear", (0.1, 0.2, 0.3))
    assert tuple(ours(*values).config[key] for key in five) == values


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
    """Measured: the same bits, for LMS once the reference's weights are made exact."""
    exact_lms(monkeypatch)
    compared = 0
    for config, n in sampled(name, 40):
        if is_number(name, config, n):
            grid = compare_grid(name, config, {"num_inference_steps": n})[0].timesteps.tolist()
            by_index = grid.count(grid[0]) > 1  # where the reference would begin later
            assert compare_run(name, config, n, by_index=by_index) == 0
            compared += 1
    assert compared >= 25


@pytest.mark.parametrize("name", NAMES)
def test_long_runs(name, monkeypatch):
    """Measured: the same bits. Of LMS the first steps, some midway, and the last ones."""
    exact_lms(monkeypatch)
    config = STABLE_DIFFUSION | ({} if name == ANCESTRAL else KARRAS)
    for begin, end in ((0, 20), (500, 520), (980, 999)) if name == LMS else ((0, None),):
        assert compare_run(name, config, 999, begin=begin, end=end, by_index=True) == 0


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
    """Measured: 9e-8. (On a beta grid, over `trailing` timesteps, a step of ten differs by 1.2e-6.)"""
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
    """The same roundings in the same order: the same bits."""
    exact_lms(monkeypatch)
    for grid in ({},) if name == ANCESTRAL else ({}, KARRAS):
        for prediction_type in SAID:
            config = STABLE_DIFFUSION | grid | {"prediction_type": prediction_type} | SMALL[name]
            worst = compare_run(name, config, 10, dtype=dtype, bound=2 * torch.finfo(dtype).eps)
            assert worst == 0


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
        with pytest.raises(ValueError, match=r"give one of num_inference_steps, timesteps(, sigmas)?, and"):
            getattr(m, name)().set_timesteps(**plan)


def test_eulers_custom_sigmas():
    for sigmas in ([14.6, 7.1, 2.22, 0.31, 0.0], [80.0, 3.0, 0.4], np.array([9.0, 0.1]), torch.tensor([1.5, 0.0])):
        for config in ({}, KARRAS, {"prediction_type": "v_prediction", "timestep_type": "continuous"}):
            compare_run(EULER, STABLE_DIFFUSION | config, {"sigmas": sigmas})
    for sigmas in ([1.0], [], [1.0, 2.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"sigmas=.*in descending order, 0 or more, and at least 2"):
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


# Beside the mathematics: data whose flow is known, from sigma 14.6 to the smallest level, 0.03, in float64


def exactly(scheduler):
    """The same levels, but differences between them taken in float64."""
    for name in ("sigmas", "middles", "ends", "ups"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def alpha_bar_of(sigma):
    return 1 / (1 + float(sigma) ** 2)


def predicted(data, x, sigma):
    """The eps that a perfect model sees in x = x0 + sigma eps."""
    return data.eps(x * alpha_bar_of(sigma) ** 0.5, alpha_bar_of(sigma))


def global_error(name, config, data, n, **options):
    """The largest distance from the exact flow through the same start. The last step, to 0, doesn't shrink with n."""
    scheduler = exactly(planned(name, n, **STABLE_DIFFUSION, **config))
    first, last = scheduler.sigmas[0], scheduler.sigmas[len(scheduler.timesteps) - 1]
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64) * scheduler.sigmas[0]
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(predicted(data, x, scheduler._seen(i)), t, x, **options).prev_sample
    a, b = alpha_bar_of(first), alpha_bar_of(last)
    return (x - data.flow(start * a**0.5, a, b) / b**0.5).abs().max().item()


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize(("name", "order"), ((EULER, 1), (HEUN, 2), (KDPM2, 2)))
def test_the_error_falls_with_the_samplers_order(name, order, data):
    """Measured from 200 to 400 steps: Euler 1.00 and 0.96 (Gaussian and mixture), Heun 2.01 and 1.99, KDPM2 2.01 and
    2.00. On an exponential grid they are 1.00, 0.96, 2.01, 2.00, 2.01, 2.00."""
    for grid in (KARRAS, EXPONENTIAL):
        errors = [global_error(name, grid, data, n) for n in (200, 400)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(
    ("order", "data", "measured"),
    (
        (1, Gaussian(), (1.00, 1.00, 1.00)),
        (2, Gaussian(), (1.97, 1.98, 1.99)),
        (3, Gaussian(), (2.91, 2.95, 2.96)),
        (4, Gaussian(), (3.78, 3.73, 3.39)),
        (2, Mixture(), (1.91, 1.97, 1.99)),
        (3, Mixture(), (2.88, 2.90, 2.86)),
        (4, Mixture(), (3.56, 3.08, 2.50)),
    ),
)
def test_lms_has_its_order_until_its_start_shows(order, data, measured):
    """From 50 steps to 100, 200 and 400. The first step of a run is Euler's, whose error falls with the square of the
    steps alone: the more slopes later ones have, the sooner that is all that is left."""
    errors = [global_error(LMS, KARRAS, data, n, order=order) for n in (50, 100, 200, 400)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx(measured, abs=0.01)


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize("order", (2, 3, 4))
def test_lms_with_an_exact_start_has_its_order(order, data):
    """Measured: 1.99 and 1.99, 2.98 and 2.99, 3.96 and 4.00 (Gaussian and mixture)."""
    errors = []
    for n in (200, 400):
        scheduler = exactly(planned(LMS, n, **STABLE_DIFFUSION, **KARRAS))
        levels = [(float(sigma), alpha_bar_of(sigma)) for sigma in scheduler.sigmas[:-1]]
        start = torch.linspace(-2, 2, 9, dtype=torch.float64)

        def flow(sigma, a, levels=levels, start=start):
            return data.flow(start * levels[0][0] * levels[0][1] ** 0.5, levels[0][1], a) / a**0.5

        scheduler.history = tuple(predicted(data, flow(*level), level[0]) for level in levels[: order - 1])
        scheduler.set_begin_index(order - 1)
        x = flow(*levels[order - 1])
        for (sigma, _), t in zip(levels[order - 1 : -1], scheduler.timesteps[order - 1 : -1], strict=True):
            x = scheduler.step(predicted(data, x, sigma), t, x, order=order).prev_sample
        errors.append((x - flow(*levels[-1])).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.06)


def test_lms_that_begins_midway_goes_astray_at_first():
    """Of a slope that is 1 everywhere every step must lead over its whole interval. From a run's start each does. From
    midway the first three take weights for more slopes than there are: the reference's number, not the right one."""

    def moves(begin):
        scheduler = exactly(planned(LMS, 10, **STABLE_DIFFUSION))
        one, x, shares = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), []
        for i in range(begin, 10):
            moved = scheduler.step(one, scheduler.timesteps[i], x).prev_sample - x
            shares.append((moved / (scheduler.sigmas[i + 1] - scheduler.sigmas[i])).item())
        return shares

    assert moves(0) == pytest.approx([1] * 10, abs=1e-12)
    shares = moves(4)
    assert shares[:3] == pytest.approx([1.558, 0.773, 1.039], abs=1e-3)
    assert shares[3:] == pytest.approx([1] * 3, abs=1e-12)


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize("grid", (KARRAS, EXPONENTIAL, {}), ids=("karras", "exponential", "linspace"))
def test_heun_beats_euler_at_equal_network_calls(grid, data):
    """From 19 calls on, 5 times and more at 79. Below 15 calls a second slope is dearer than it is worth on the two
    grids that take long steps at high levels: at 9 calls Heun's error there is 2 times Euler's, or more."""
    ratios = {
        n: global_error(EULER, grid, data, 2 * n - 1) / global_error(HEUN, grid, data, n) for n in (5, 10, 20, 40)
    }
    assert ratios[10] > 1 and ratios[20] > 2.5 and ratios[40] > 5
    assert ratios[5] < 0.6 or grid == {}


def test_heuns_last_step_is_eulers_and_the_others_the_mean_of_two_slopes():
    """dx/dsigma = sigma, say: Heun's rule has the integral of a straight line without error, Euler's has not."""
    scheduler = exactly(planned(HEUN, 6, **STABLE_DIFFUSION))
    x = torch.zeros(1, 1, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.full_like(x, scheduler.sigmas[i].item()), t, x).prev_sample
        if i % 2:
            assert x.item() == pytest.approx(
                (scheduler.sigmas[i] ** 2 - scheduler.sigmas[0] ** 2).item() / 2, rel=1e-12
            )
    before = (scheduler.sigmas[-2] ** 2 - scheduler.sigmas[0] ** 2).item() / 2
    assert x.item() == pytest.approx(before - scheduler.sigmas[-2].item() ** 2, rel=1e-12)


def test_kdpm2s_middle_is_the_geometric_one():
    scheduler = exactly(planned(KDPM2, 6, **STABLE_DIFFUSION))
    levels = scheduler.sigmas[[0, *range(1, 12, 2)]]
    torch.testing.assert_close(scheduler.middles, (levels[:-1] * levels[1:]).sqrt(), rtol=1e-6, atol=0)
    x = torch.zeros(1, 1, dtype=torch.float64)  # dx/dsigma = sigma: the slope in the middle leads over the interval
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler._seen(i)
        assert torch.equal(scheduler.scale_model_input(torch.ones(1), t), torch.ones(1) / (seen**2 + 1) ** 0.5)
        x = scheduler.step(torch.full_like(x, seen.item()), t, x).prev_sample
        if i % 2:
            moves = scheduler.middles[: i // 2 + 1] * levels.diff()[: i // 2 + 1]
            assert x.item() == pytest.approx(moves.sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_three_forms_of_one_prediction_give_one_step(name):
    x0, eps = normal(0, 2, 3, dtype=torch.float64), normal(1, 2, 3, dtype=torch.float64)
    results = []
    for kind in ("epsilon", "sample", "v_prediction"):
        scheduler = exactly(planned(name, 5, **STABLE_DIFFUSION, prediction_type=kind))
        x, generator = x0 + scheduler.sigmas[0] * eps, torch.Generator().manual_seed(0)
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler._seen(i)
            noise = (x - x0) / sigma
            said = {"epsilon": noise, "sample": x0, "v_prediction": (noise - sigma * x0) / (sigma**2 + 1) ** 0.5}[kind]
            x = scheduler.step(said, t, x, **({"generator": generator} if name in STOCHASTIC else {})).prev_sample
        results.append(x)
        torch.testing.assert_close(x, x0, rtol=1e-9, atol=1e-9)  # a model that knows x0 is led there by all of them
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)


def test_clip_sample_bounds_heuns_x0():
    scheduler = planned(HEUN, 3, clip_sample=True, clip_sample_range=0.7, prediction_type="sample")
    x0 = scheduler.step(normal(0, 4, 5), scheduler.timesteps[0], normal(1, 4, 5)).pred_original_sample
    assert torch.equal(x0, normal(0, 4, 5).clamp(-0.7, 0.7))


# Stochastic samplers


def moments_of_a_run(monkeypatch, name, n, variance, **config):
    """Mean and variance at each level, for data N(1, variance), without drawing. An interval leads from x and noise to
    a x + b + c noise; three samples say which, begun from 0, 1 and 0 with noise 0, 0 and 1."""
    begins = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
    monkeypatch.setattr(euler_ancestral, "randn_tensor", lambda *_: torch.tensor([[0.0], [0.0], [1.0]]).double())
    monkeypatch.setattr(kdpm2_ancestral, "randn_tensor", lambda *_: torch.tensor([[0.0], [0.0], [1.0]]).double())
    scheduler = exactly(planned(name, n, **(STABLE_DIFFUSION | config)))
    mean, spread, moments = 1.0, variance + scheduler.sigmas[0].item() ** 2, []
    for i in range(0, len(scheduler.timesteps), scheduler.order):
        x = begins
        for j in range(i, min(i + scheduler.order, len(scheduler.timesteps))):
            sigma = scheduler._seen(j)
            x = scheduler.step(sigma * (x - 1) / (variance + sigma**2), scheduler.timesteps[j], x).prev_sample
        b, a, c = x[0].item(), (x[1] - x[0]).item(), (x[2] - x[0]).item()
        mean, spread = a * mean + b, a**2 * spread + c**2
        moments.append((mean, spread))
    return moments, scheduler.sigmas[1 :: scheduler.order].tolist()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ancestral_samplers_have_a_points_moments_at_every_level(name, monkeypatch):
    """With any number of steps: x0 is known, and what is left is noise of the level's deviation."""
    for n in (1, 2, 5, 20):
        moments, sigmas = moments_of_a_run(monkeypatch, name, n, 0.0)
        assert [mean for mean, _ in moments] == pytest.approx([1.0] * n, abs=1e-9)
        assert [spread for _, spread in moments] == pytest.approx([sigma**2 for sigma in sigmas], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("name", "order"), ((ANCESTRAL, 1), (KDPM2_ANCESTRAL, 2)))
def test_an_ancestral_runs_variance_falls_to_the_datas_with_its_order(name, order, monkeypatch):
    """Measured: 0.99 and 2.00, a fifth of the timesteps before the end: the last levels are far from evenly spaced."""
    errors = []
    for n in (25, 50, 100, 200, 400):
        moments, sigmas = moments_of_a_run(monkeypatch, name, n + 1, 0.25, **FINE)
        i = n * 4 // 5 - 1
        assert moments[i][0] == pytest.approx(1, abs=1e-9)
        errors.append(abs(moments[i][1] - 0.25 - sigmas[i] ** 2))
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_ancestral_samplers_draw_from_the_data(name):
    """Mean and full covariance of 20,000 chains after 500 steps."""
    generator, eye = torch.Generator().manual_seed(1), torch.eye(3, dtype=torch.float64)
    scheduler = exactly(planned(name, 500, **STABLE_DIFFUSION))
    first = COVARIANCE + scheduler.sigmas[0] ** 2 * eye
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(first).T + MEAN
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler._seen(i)
        eps = sigma * (x - MEAN) @ torch.linalg.inv(COVARIANCE + sigma**2 * eye)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    check_moments(x, MEAN, COVARIANCE)


def test_ancestral_levels():
    """sigma_down is sigma'^2 / sigma, and the squares add up; a step that is too long for float32 isn't NaN."""
    sigma, sigma_next = torch.tensor([14.6, 3.0, 0.1]).double(), torch.tensor([7.0, 2.9, 0.0]).double()
    up, down = ancestral(sigma, sigma_next)
    torch.testing.assert_close(down, sigma_next**2 / sigma, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up**2 + down**2, sigma_next**2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("n", (2, 3, 4, 5, 10))
def test_long_first_steps_give_numbers_where_the_reference_gives_nan(name, n):
    config = {"beta_schedule": "squaredcos_cap_v2"}
    assert n == 2 or not all(is_number(name, config | spacing, n) for spacing in SPACINGS) or name == ANCESTRAL
    for spacing in SPACINGS:
        scheduler = planned(name, n, **config, **spacing)
        x = normal(0, 2, 3) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            assert t.isfinite()
            x = scheduler.step(normal(1, 2, 3), t, x).prev_sample
        assert x.isfinite().all()


# State


def run_of(scheduler, n, x, stop=None):
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator} if type(scheduler).__name__ in STOCHASTIC else {}
    for t in scheduler.timesteps[:stop]:
        x = scheduler.step((x + t).sin(), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
def test_set_timesteps_clears_all_state(name):
    for stop in (1, 2, 3, 4):
        used, fresh = getattr(m, name)(), getattr(m, name)()
        run_of(used, 5, normal(0, 2, 3), stop)
        used.set_begin_index(2)
        assert torch.equal(run_of(used, 4, normal(1, 2, 3)), run_of(fresh, 4, normal(1, 2, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_shallow_copy_is_a_run_of_its_own(name):
    scheduler = planned(name, 6)
    x, options = normal(0, 2, 3), lambda: {"generator": torch.Generator().manual_seed(3)} if name in STOCHASTIC else {}
    for t in scheduler.timesteps[:3]:
        scheduler.step(normal(1, 2, 3), t, x, **options())
    other = copy.copy(scheduler)
    ahead = [other.step(normal(i, 2, 3), scheduler.timesteps[i], x, **options()).prev_sample for i in (3, 4, 5)]
    again = [scheduler.step(normal(i, 2, 3), scheduler.timesteps[i], x, **options()).prev_sample for i in (3, 4, 5)]
    assert all(map(torch.equal, ahead, again))


@pytest.mark.parametrize("name", NAMES)
def test_devices_and_dtypes(name):
    """Meta tensors stand for another device."""
    scheduler = getattr(m, name)()
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.device.type == "meta" and scheduler.sigmas.device.type == "cpu"
    scheduler.set_begin_index(0)
    out = scheduler.step(normal(0, 2, 3).to("meta"), 1.0, normal(0, 2, 3).to("meta")).prev_sample
    assert (out.device.type, out.shape) == ("meta", (2, 3))
    scheduler = planned(name, 3)
    x = normal(0, 2, 3, dtype=torch.float64)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_configs_go_through_other_samplers(name):
    ours = getattr(m, name)(**STABLE_DIFFUSION, num_train_timesteps=50, timestep_spacing="trailing")
    for other in NAMES:
        swapped = getattr(m, other).from_config(ours.config)
        assert dict(getattr(m, name).from_config(swapped.config).config) == dict(ours.config)
        theirs = getattr(diffusers, other).from_config(getattr(diffusers, name).from_config(dict(ours.config)).config)
        assert all(swapped.config[key] == value for key, value in theirs.config.items() if key in swapped.config)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_more_betas_than_timesteps_are_used_from_their_start(name):
    betas = torch.linspace(0.001, 0.02, 1000).tolist()
    scheduler = getattr(m, name)(trained_betas=betas, num_train_timesteps=500)
    scheduler.set_timesteps(10)
    reference = getattr(diffusers, name)(trained_betas=betas, num_train_timesteps=500)
    reference.set_timesteps(10)
    assert scheduler.sigmas.equal(reference.sigmas) and scheduler.timesteps.equal(reference.timesteps)
