"""LCM, TCD, DDIM backwards, and the four with a loop of their own, beside the reference's and the mathematics."""

import inspect
import itertools
import math
import random

import diffusers
import numpy as np
import pytest
import torch
from sampler_parity import STABLE_DIFFUSION, compare_run, product
from test_properties_schedulers import END, FINE, Gaussian, Mixture, alpha_bar_at, exact

import minidiff as m
from minidiff.loading.config import ConfigError

PREDICTIONS = ("epsilon", "sample", "v_prediction")
X0_BOUNDS = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
)
DISTILLED = ("LCMScheduler", "TCDScheduler")


def sampled(configs, count):
    configs = list(configs)
    return random.Random(0).sample(configs, min(count, len(configs)))


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 3, 4, 3)), generator=torch.Generator().manual_seed(seed)).to(dtype)


# LCM and TCD


def distilled_configs():
    schedules = ({}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 500})
    return product(
        schedule=schedules,
        prediction_type=PREDICTIONS,
        bound=X0_BOUNDS,
        original_inference_steps=(50, 100, 333),
        set_alpha_to_one=(True, False),
        timestep_scaling=(10.0, 3.0),
        rescale_betas_zero_snr=(False, True),
    )


def has_no_number(name, config):
    """From the last timestep of zero terminal SNR, where eps says nothing of x0."""
    bounded = config.get("clip_sample") and name != "TCDScheduler"
    return config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon" and not bounded


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_models_step_as_the_reference(name):
    compared = 0
    for number, config in enumerate(sampled(distilled_configs(), 200)):
        n = (1, 2, 3, 4, 5, 8, 10, 20, 50)[number % 9]
        T, original = config.get("num_train_timesteps", 1000), config["original_inference_steps"]
        last = T // original * original - 1
        if has_no_number(name, config) and last == T - 1:
            with pytest.raises(ValueError, match=f"alpha_bar is 0 at timestep {last}"):
                getattr(m, name)(**config).set_timesteps(n)
            continue
        options = {"eta": (0.0, 0.3, 1.0)[number % 3]} if name == "TCDScheduler" else {}
        compare_run(name, config, n, **options)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize(
    "plan",
    [
        {"num_inference_steps": 4, "strength": 0.5},
        {"num_inference_steps": 7, "strength": 0.33},
        {"num_inference_steps": 3, "original_inference_steps": 20},
        {"num_inference_steps": 999, "original_inference_steps": 1000},
        {"num_inference_steps": 20, "original_inference_steps": 77, "strength": 0.6},
        {"timesteps": [999, 759, 499, 259]},
        {"timesteps": [999, 759, 499, 259], "strength": 0.5},
        {"timesteps": [959, 19]},
    ],
    ids=str,
)
def test_the_grids_of_distilled_models(name, plan):
    for config in ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}):
        compare_run(name, config, plan)


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_runs_begin_midway(name):
    """At the place that set_begin_index says, else at the timestep's own."""
    for begin in (1, 3):
        for by_index in (False, True):
            compare_run(name, {}, 8, begin=begin, by_index=by_index)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_reference_leaves_lcms_custom_timesteps_with_less_strength_noisy(strength):
    """Right would be to draw no noise in the last step; it counts the timesteps that strength left out."""
    x = torch.zeros(1, 3, 8, 8)
    for scheduler in (m.LCMScheduler(), diffusers.LCMScheduler()):
        scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=strength)
        for t in scheduler.timesteps:
            out = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0))
        alpha_bar = scheduler.alphas_cumprod[259]
        assert out.prev_sample.std().item() == pytest.approx(
            (1 - alpha_bar.item()) ** 0.5 if strength < 1 else 0, rel=0.1
        )


@pytest.mark.parametrize("name", [*DISTILLED, "DDIMInverseScheduler"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    """Bit by bit in half precision. In float64 LCM's c_skip is a float64 here, and there a float32 of tensors."""
    bound = 1e-7 if dtype == torch.float64 else 0
    for prediction_type in PREDICTIONS:
        config = {"prediction_type": prediction_type, "set_alpha_to_one": False}
        compare_run(name, config, 6, dtype=dtype, bound=bound)


@pytest.mark.parametrize("name", DISTILLED)
def test_previous_timestep_and_noise(name):
    ours, reference = getattr(m, name)(), getattr(diffusers, name)()
    x, noise = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)).chunk(2)
    assert ours.previous_timestep(7) == reference.previous_timestep(7) == 6
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5)
    for t in reference.timesteps:
        assert ours.previous_timestep(t).item() == reference.previous_timestep(t).item()
        for method in ("add_noise", "get_velocity"):
            a, b = (getattr(one, method)(x, noise, t.view(1)) for one in (ours, reference))
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", DISTILLED)
def test_runs_that_distilled_models_cannot_make(name):
    scheduler = getattr(m, name)()
    for arguments, error in (
        ({"num_inference_steps": 51}, r"num_inference_steps=51 must lie in 1..50"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0 must lie in 1..50"),
        ({"num_inference_steps": 30, "strength": 0.5}, r"must lie in 1..25.*strength=0.5"),
        ({"num_inference_steps": 5, "strength": 1.5}, r"strength=1.5 must be finite, and in 0..1"),
        ({"num_inference_steps": 5, "strength": 0}, r"must lie in 1..0.*strength=0"),
        ({"timesteps": [999, 499], "strength": 0.1}, r"strength=0.1 leaves none of the 2 timesteps"),
        ({"timesteps": [499, 999]}, "descending order"),
        ({"timesteps": [1000]}, r"lie in 0..999"),
        ({}, "pass either num_inference_steps or timesteps"),
        ({"num_inference_steps": 5, "timesteps": [999]}, "pass either"),
    ):
        with pytest.raises(ValueError, match=error):
            scheduler.set_timesteps(**arguments)
    if name == "LCMScheduler":
        with pytest.raises(ValueError, match=r"original_inference_steps=1001 must lie in 1..1000"):
            scheduler.set_timesteps(5, original_inference_steps=1001)
    with pytest.warns(UserWarning, match=r"timesteps=\[3, 500\] are none of the model's distillation"):
        scheduler.set_timesteps(timesteps=[999, 500, 3])
    with pytest.raises(ValueError, match=r"eta=1.2 must be finite, and in 0..1"):
        m.TCDScheduler().step(torch.zeros(1), 3, torch.zeros(1), eta=1.2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        getattr(m, name)().step(torch.zeros(1), 3, torch.zeros(1))


@pytest.mark.parametrize("name", ["DDIMScheduler", *DISTILLED, "DDPMScheduler"])
def test_zero_terminal_snr_with_eps_is_an_error_before_the_run(name):
    """The reference gives NaN from its first step on."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    reference, sample = getattr(diffusers, name)(**config), torch.randn(1, 3, 2, 2)
    reference.set_timesteps(10)
    assert not reference.step(sample, reference.timesteps[0], sample).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match=r"alpha_bar is 0 at timestep 999.*prediction_type='epsilon'.*'v_prediction'"):
        getattr(m, name)(**config).set_timesteps(10)
    for changes in ({"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"clip_sample": True}):
        if name != "TCDScheduler" or "clip_sample" not in changes:
            compare_run(name, config | changes, 10)
    if name.startswith("DD"):  # leading doesn't begin there
        compare_run(name, config | {"timestep_spacing": "leading"}, 10)
    with pytest.raises(ValueError, match="PNDMScheduler divides by it"):
        m.PNDMScheduler(trained_betas=[1.0] * 1000, prediction_type="v_prediction").set_timesteps(5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "RePaintScheduler"])
def test_a_level_without_noise_is_an_error_before_the_run(name):
    """The reference divides 0 by 0 in the last step."""
    rest = {"PNDMScheduler": {"skip_prk_steps": True}}.get(name, {"clip_sample": False})
    reference, x = getattr(diffusers, name)(**rest, beta_start=0.0), torch.randn(1, 3, 2, 2)
    reference.set_timesteps(10)
    more = (x, x) if name == "RePaintScheduler" else ()
    for t in reference.timesteps:
        out = reference.step(x, t, x, *more).prev_sample
    assert out.isnan().all()
    for betas, error in (
        ({"beta_start": 0.0}, "alpha_bar is 1 at timestep 0, free of noise"),
        ({"trained_betas": [1.0] * 1000}, "alpha_bar is 0 at timestep 900, all noise"),
    ):
        scheduler = getattr(m, name)(**rest, **betas)
        with pytest.raises(ValueError, match=error):
            scheduler.set_timesteps(10)
        assert scheduler.num_inference_steps is None


# DDIM backwards


def test_every_inverse_config_steps_as_the_reference():
    axes = {
        "schedule": ({}, STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 300}),
        "prediction_type": PREDICTIONS,
        "bound": X0_BOUNDS[:2],
        "set_alpha_to_one": (True, False),
        "spacing": ({"timestep_spacing": "leading", "steps_offset": 1}, {}, {"timestep_spacing": "trailing"}),
        "rescale_betas_zero_snr": (False, True),
    }
    compared = 0
    for number, config in enumerate(product(**axes)):
        n = (1, 2, 3, 5, 10, 20, 50)[number % 7]
        try:
            m.DDIMInverseScheduler(**config).set_timesteps(n)
        except ValueError as error:
            assert "prediction_type='sample' gives no eps" in str(error)
            reference = diffusers.DDIMInverseScheduler(**config)
            reference.set_timesteps(n)
            out = reference.step(torch.ones(1, 2), reference.timesteps[0], torch.ones(1, 2)).prev_sample
            assert out.isnan().any()
            continue
        compare_run("DDIMInverseScheduler", config, n)
        compared += 1
    assert compared > 230
    compare_run("DDIMInverseScheduler", STABLE_DIFFUSION, 999)
    with pytest.raises(ConfigError, match="timestep_spacing='linspace' is not supported; supported: 'leading'"):
        m.DDIMInverseScheduler(timestep_spacing="linspace")


def flow_error(name, data, n):
    """The largest distance of a run from the exact flow. TCD with eta 0 goes down to timestep END, DDIM backwards up
    from it; neither is asked about the last steps, in which the curve has no bound on its second derivative."""
    up, config = name == "DDIMInverseScheduler", {"clip_sample": False, "beta_schedule": "linear"}
    config |= {} if up else {"original_inference_steps": 4000}
    scheduler = exact(getattr(m, name)(**FINE, **config))
    scheduler.set_timesteps(n)
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    grid = [t for t in scheduler.timesteps.tolist() if t > END or (t == END and not up)]
    for t in grid:
        options = {} if up else {"eta": 0.0}
        x = scheduler.step(data.eps(x, alpha_bar_at(scheduler, t)), t, x, **options).prev_sample
    ends = (END, grid[-1]) if up else (grid[0], scheduler.timesteps[len(grid)].item())
    return (x - data.flow(start, *(alpha_bar_at(scheduler, t) for t in ends))).abs().max().item()


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize("name", ["TCDScheduler", "DDIMInverseScheduler"])
def test_the_order_is_1(name, data):
    """Measured at 200 and 400 steps: TCD 0.999 and 1.002, DDIM backwards 0.990 and 0.990."""
    assert math.log2(flow_error(name, data, 200) / flow_error(name, data, 400)) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("name", "options"), [("LCMScheduler", {}), *(("TCDScheduler", {"eta": e}) for e in (0.3, 1.0))]
)
def test_distilled_runs_follow_the_forward_process(name, options):
    """Where the data is a point, 2, a model that knows it sees a path's end, and every sample is add_noise's: its mean
    and deviation, of 20,000 chains, within 5 standard errors. The last step draws nothing, or ends at timestep 0."""
    scheduler = exact(getattr(m, name)())
    scheduler.set_timesteps(5)
    generator, count = torch.Generator().manual_seed(0), 20_000
    a = alpha_bar_at(scheduler, scheduler.timesteps[0].item())
    x = 2 * a**0.5 + (1 - a) ** 0.5 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    for t, t_next in itertools.pairwise([*scheduler.timesteps.tolist(), 0 if name == "TCDScheduler" else -1]):
        a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t_next)
        eps = (x - 2 * a**0.5) / (1 - a) ** 0.5
        x = scheduler.step(eps, t, x, generator=generator, **options).prev_sample
        error = 5 * (1 - b) ** 0.5 / count**0.5 + 1e-4  # c_skip at timestep 199, of LCM
        assert x.mean().item() == pytest.approx(2 * b**0.5, abs=error)
        assert x.std().item() == pytest.approx((1 - b) ** 0.5, abs=error)


def test_lcm_keeps_the_sample_at_timestep_0():
    """The boundary condition, for data of deviation 0.5: c_skip is 1 there, c_out is 0."""
    scheduler = m.LCMScheduler(timestep_scaling=0.01, prediction_type="sample")

    def denoised(x0, t, x):
        scheduler.set_timesteps(1)
        scheduler.set_begin_index(0)  # wherever t stands
        return scheduler.step(torch.tensor([x0]), t, torch.tensor([x])).denoised.item()

    for t, scaled in ((0, 0.0), (30, 0.3), (999, 9.99)):
        assert denoised(0.0, t, 1.0) == pytest.approx(0.25 / (scaled**2 + 0.25), rel=1e-6)
        assert denoised(1.0, t, 0.0) == pytest.approx(scaled / (scaled**2 + 0.25) ** 0.5, abs=1e-6)


def test_ddim_backwards_and_forwards_again():
    """With one eps throughout both go along the same curve: a picture is found again."""
    config = {"clip_sample": False, "set_alpha_to_one": False}
    inverse, forward = exact(m.DDIMInverseScheduler(**config)), exact(m.DDIMScheduler(**config))
    x0, eps = normal(0).double(), normal(1).double()
    x = x0
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps.tolist():
            x = scheduler.step(eps, t, x).prev_sample
        if scheduler is inverse:
            assert (x - x0).abs().max() > 0.5
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse.grid, forward.grid.flip(0))


# The four with a loop of their own


OWN_LOOP = ("FlowMatchEulerDiscreteScheduler", "KarrasVeScheduler", "RePaintScheduler", "ScoreSdeVeScheduler")
NAMES = (*DISTILLED, "DDIMInverseScheduler", *OWN_LOOP)


def reference_class(name):
    if name == "KarrasVeScheduler":
        from diffusers.schedulers.deprecated import KarrasVeScheduler

        return KarrasVeScheduler
    return getattr(diffusers, name)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_configs_are_the_references(name, tmp_path):
    ours, reference = getattr(m, name), reference_class(name)
    parameters, expected = (inspect.signature(cls).parameters for cls in (ours, reference))
    expected = {key: value for key, value in expected.items() if key != "kwargs"}
    named = [key for key in parameters if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert named == list(expected)[: len(named)]
    assert {key: p.default for key, p in parameters.items()} == {key: p.default for key, p in expected.items()}
    methods = ("set_timesteps", "step", "step_pred", "step_correct", "set_sigmas", "undo_step", "add_noise_to_input")
    for method in (*methods, "scale_noise", "time_shift", "set_shift", "previous_timestep"):
        if hasattr(reference, method):
            a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, reference))
            assert {key: p.default for key, p in a.items()} == {key: p.default for key, p in b.items()}, method
            assert list(a) == list(b), method
        else:
            assert not hasattr(ours, method) or method == "previous_timestep"
    saved = {key: value for key, value in reference().config.items() if not key.startswith("_")}
    reference().save_pretrained(tmp_path / "theirs")
    ours.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    again = reference.from_pretrained(tmp_path / "ours").config
    assert {key: value for key, value in again.items() if not key.startswith("_")} == saved
    assert dict(ours.from_pretrained(tmp_path / "ours").config) == saved == dict(ours().config)
    assert ours().order == reference().order
    assert bool(ours.own_loop) == (name in OWN_LOOP)


@pytest.mark.parametrize("name", OWN_LOOP)
def test_what_has_its_own_loop_says_whose(name):
    """A pipeline ends its error with these words: "RePaintScheduler takes the picture and its mask in each step"."""
    assert getattr(m, name).own_loop.split()[0] in ("takes", "has", "needs")
    for other in ("DDIMScheduler", "EulerDiscreteScheduler", *DISTILLED):
        assert getattr(m, other).own_loop == ""


def pair(name, *args, **config):
    return getattr(m, name)(*args, **config), reference_class(name)(*args, **config)


def check_equal(got, want, bound=1e-6):
    """Outputs of all fields, or tensors."""
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and want.isfinite().all()
        assert (got - want).abs().max() <= bound * want.abs().max()
        return
    got, want = tuple(got), want if isinstance(want, tuple) else want.to_tuple()
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        check_equal(x, y, bound)


# RePaint


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 20, 50, 250, 999])
@pytest.mark.parametrize("jumps", [{}, {"jump_length": 3, "jump_n_sample": 4}, {"jump_length": 1, "jump_n_sample": 1}])
def test_repaints_timesteps(n, jumps):
    ours, reference = pair("RePaintScheduler")
    for one in (ours, reference):
        one.set_timesteps(n, **jumps)
    assert ours.timesteps.dtype == torch.int64
    assert ours.timesteps.equal(reference.timesteps)


REPAINT = {
    "schedule": ({}, STABLE_DIFFUSION, {"beta_schedule": "sigmoid"}, {"beta_schedule": "squaredcos_cap_v2"}),
    "eta": (0.0, 0.5, 1.0),
    "clip_sample": (True, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_repaint_steps_and_undoes_steps_as_the_reference(dtype):
    for config in product(**REPAINT):
        config.pop("steps_offset", None)
        ours, reference = pair("RePaintScheduler", **config)
        for one in (ours, reference):
            one.set_timesteps(250, jump_length=3, jump_n_sample=2)
        sample, picture = normal(0, dtype=dtype), normal(1, dtype=dtype)
        mask = (normal(2, 2, 1, 4, 3) > 0).to(dtype)
        draws = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)]
        last = 1000
        for i, t in enumerate([*reference.timesteps[:20], *reference.timesteps[-6:]]):
            if t < last:
                arguments = (normal(i, dtype=dtype), t, sample, picture, mask)
                got = ours.step(*arguments, generator=draws[0])
                want = reference.step(*arguments, generator=draws[1])
                check_equal(got, want, 0 if dtype != torch.float64 else 1e-14)
                sample = want.prev_sample
            else:
                got = ours.undo_step(sample, last, generator=draws[0])
                want = reference.undo_step(sample, last, generator=draws[1])
                check_equal(got, want, 0)
                sample = want
            assert draws[0].get_state().equal(draws[1].get_state())
            last = t


def test_repaint_keeps_what_the_mask_knows():
    """Where it is 1 the step is `add_noise` of the picture, or at the end the picture itself; where it is 0, DDIM's."""
    scheduler, ddim = m.RePaintScheduler(clip_sample=False), m.DDIMScheduler(clip_sample=False)
    sample, eps, picture = normal(0), normal(1), normal(2)
    mask = torch.zeros(1, 1, 4, 3)
    mask[..., :2, :] = 1
    for one in (scheduler, ddim):
        one.set_timesteps(10)
    for t in (500, 0):
        out = scheduler.step(eps, t, sample, picture, mask, generator=torch.Generator().manual_seed(5)).prev_sample
        assert torch.equal(out[..., 2:, :], ddim.step(eps, t, sample).prev_sample[..., 2:, :])
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(5))
        known = ddim.add_noise(picture, noise, torch.tensor([t - 100]))[..., :2, :] if t else picture[..., :2, :]
        torch.testing.assert_close(out[..., :2, :], known, rtol=0, atol=1e-7)


def test_undo_step_is_the_forward_process():
    """From the picture itself, and a step's timesteps on: mean and variance of add_noise; 10,000 draws."""
    scheduler = m.RePaintScheduler()
    scheduler.set_timesteps(10)
    x0 = torch.full((10_000, 1), 2.0)
    x = scheduler.undo_step(x0, 0, generator=torch.Generator().manual_seed(0))
    alpha_bar = scheduler.alphas_cumprod[99].item()
    assert x.mean().item() == pytest.approx(2 * alpha_bar**0.5, abs=5 * (1 - alpha_bar) ** 0.5 / 100)
    assert x.var().item() == pytest.approx(1 - alpha_bar, rel=5 * (2 / 10_000) ** 0.5)


def test_what_repaint_cannot_do():
    scheduler, x = m.RePaintScheduler(eta=3.0), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 5, x, x, x)
    for arguments in ((0,), (1001,), (10, 0)):
        with pytest.raises(ValueError, match=f"num_inference_steps={arguments[0]} must lie in 1..1000"):
            scheduler.set_timesteps(*arguments)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta=3\.0 is too large at timestep 500"):
        scheduler.step(x, 500, x, x, x)
    with pytest.raises(TypeError, match="mask must be a tensor"):
        scheduler.step(x, 500, x, x, None)
    with pytest.raises(ValueError, match=r"timestep=901 must lie in 0..900"):
        scheduler.undo_step(x, 901)


# KarrasVe


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 50, 999])
def test_karras_ve_is_the_references(n):
    for config in ({}, {"sigma_max": 80, "s_churn": 3.0, "s_min": 1}, {"sigma_min": 0.1, "s_churn": 0}):
        ours, reference = pair("KarrasVeScheduler", **config)
        assert ours.init_noise_sigma == reference.init_noise_sigma and ours.timesteps is reference.timesteps is None
        for one in (ours, reference):
            one.set_timesteps(n)
        assert ours.timesteps.equal(reference.timesteps) and ours.schedule.equal(reference.schedule)
        sample = normal(0) * 100
        for t in reference.timesteps[:20]:
            sigma, sigma_prev = reference.schedule[t], reference.schedule[t - 1] if t > 0 else 0
            draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
            got = ours.add_noise_to_input(sample, sigma, generator=draws[0])
            want = reference.add_noise_to_input(sample, sigma, generator=draws[1])
            check_equal(got, want, 0)
            hat, sigma_hat = want
            got = ours.step(normal(1), sigma_hat, sigma_prev, hat)
            want = reference.step(normal(1), sigma_hat, sigma_prev, hat)
            check_equal(got, want)
            check_equal(ours.step(normal(1), sigma_hat, sigma_prev, hat, return_dict=False), want.to_tuple()[:2])
            if sigma_prev != 0:
                rest = (normal(2), sigma_hat, sigma_prev, hat, want.prev_sample, want.derivative)
                want = reference.step_correct(*rest)
                check_equal(ours.step_correct(*rest), want)
            sample = want.prev_sample


def test_what_karras_ve_cannot_do():
    scheduler, x = m.KarrasVeScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="num_inference_steps=1 must be 2 or more"):  # the reference's schedule is NaN
        scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="sigma_prev is 0, where there is no slope"):
        scheduler.step_correct(x, 1.0, 0, x, x, x)
    with pytest.raises(ValueError, match="call set_timesteps before add_noise_to_input"):
        scheduler.add_noise_to_input(x, 1.0)


def karras_ve_error(n, correct):
    """From 20 down to 0.5, on data N(1, 0.25), beside the exact flow: the distance from 1 in deviations stays."""
    scheduler = m.KarrasVeScheduler(s_churn=0)
    sigmas = torch.logspace(math.log10(20), math.log10(0.5), n + 1, dtype=torch.float64)
    x = start = torch.linspace(-30, 30, 9, dtype=torch.float64)

    def model(x, sigma):  # minus eps
        return -sigma * (x - 1) / (0.25 + sigma**2)

    for sigma, sigma_next in itertools.pairwise(sigmas):
        out = scheduler.step(model(x, sigma), sigma, sigma_next, x)
        if correct:
            ahead = model(out.prev_sample, sigma_next)
            out = scheduler.step_correct(ahead, sigma, sigma_next, x, out.prev_sample, out.derivative)
        x = out.prev_sample
    exact = 1 + (start - 1) * ((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2)) ** 0.5
    return (x - exact).abs().max().item()


@pytest.mark.parametrize(("correct", "order"), [(False, 1), (True, 2)])
def test_karras_ves_order(correct, order):
    """Measured: 0.998 without the correction, 2.009 with it."""
    assert math.log2(karras_ve_error(100, correct) / karras_ve_error(200, correct)) == pytest.approx(order, abs=0.05)


# ScoreSdeVe


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 20, 50, 999])
def test_score_sde_ve_is_the_references(n):
    for config in ({}, {"snr": 0.3, "sigma_min": 0.1, "sigma_max": 50.0, "sampling_eps": 1e-3}):
        ours, reference = pair("ScoreSdeVeScheduler", **config)
        for planned in (False, True):
            for one in (ours, reference) if planned else ():
                one.set_timesteps(n)
                one.set_sigmas(n)
            for key in ("timesteps", "sigmas", "discrete_sigmas"):
                assert getattr(ours, key).equal(getattr(reference, key)), key
        sample = normal(0) * 100
        draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
        for t in reference.timesteps[:20]:
            got = ours.step_correct(normal(1), sample, generator=draws[0])
            want = reference.step_correct(normal(1), sample, generator=draws[1])
            check_equal(got, want)
            sample = want.prev_sample
            got = ours.step_pred(normal(2), t, sample, generator=draws[0])
            want = reference.step_pred(normal(2), t, sample, generator=draws[1])
            check_equal(got, want)
            assert draws[0].get_state().equal(draws[1].get_state())
            sample = want.prev_sample
        places = torch.tensor([0, n - 1])
        check_equal(ours.add_noise(sample, normal(3), places), reference.add_noise(sample, normal(3), places))
        times = torch.tensor([1.0, 0.3])
        got = ours.step_pred(normal(2), times, sample, generator=draws[0], return_dict=False)
        check_equal(got, reference.step_pred(normal(2), times, sample, generator=draws[1], return_dict=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_score_sde_ve_in_other_dtypes(dtype):
    """The reference's levels are float32 and have a dimension, so that half precision becomes float32."""
    ours, reference = pair("ScoreSdeVeScheduler", sigma_max=50.0)
    bound = 1e-6 if dtype == torch.float64 else 0
    sample, score = normal(0, dtype=dtype), normal(1, dtype=dtype)
    draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    got, want = (
        one.step_pred(score, 0.5, sample, generator=g) for one, g in zip((ours, reference), draws, strict=True)
    )
    check_equal(got, want, bound)
    got, want = (one.step_correct(score, sample, generator=g) for one, g in zip((ours, reference), draws, strict=True))
    check_equal(got, want, 1e-6)


def test_score_sde_ve_draws_from_the_data():
    """N(1, 0.25), with its exact score: 20,000 chains of 200 levels with one correction each, moments within 2 percent.
    The correction alone keeps each level's own distribution."""
    scheduler = m.ScoreSdeVeScheduler(sigma_max=50.0, snr=0.05)
    scheduler.set_timesteps(200)
    scheduler.set_sigmas(200)
    generator = torch.Generator().manual_seed(0)
    x = 1 + 50 * torch.randn(20_000, 1, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i]
        x = scheduler.step_correct((1 - x) / (0.25 + sigma**2), x, generator=generator).prev_sample
        out = scheduler.step_pred((1 - x) / (0.25 + sigma**2), t, x, generator=generator)
        x = out.prev_sample
    assert out.prev_sample_mean.mean().item() == pytest.approx(1, abs=0.02)
    assert out.prev_sample_mean.std().item() == pytest.approx(0.5, rel=0.02)


def test_what_score_sde_ve_cannot_do():
    scheduler, x = m.ScoreSdeVeScheduler(num_train_timesteps=5), torch.zeros(1, 1, 2, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"planned 10 steps, set_sigmas 5: call set_sigmas\(10\)"):  # IndexError there
        scheduler.step_pred(x, 1.0, x)
    with pytest.raises(ConfigError, match="sigma_min=0 is not supported: it must be more than 0"):
        m.ScoreSdeVeScheduler(sigma_min=0)


# FlowMatchEuler


FLOW = "FlowMatchEulerDiscreteScheduler"


def flow_runs():
    """Configs, and what set_timesteps is given."""
    grids = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
    shifts = ({}, {"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1})
    dynamic = ({"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"})
    axes = {"grid": grids, "shift": (*shifts, *dynamic), "T": ({}, {"num_train_timesteps": 100})}
    for config in product(**axes, invert_sigmas=(False, True), stochastic_sampling=(False, True)):
        for n in (1, 2, 3, 5, 10, 20, 50, 999):
            mu = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
            yield config, {"num_inference_steps": n, **mu}
            if n < 20:
                sigmas, timesteps = (np.linspace(end, end / n, n).tolist() for end in (1.0, 90.0))
                yield config, {"sigmas": sigmas, **mu}
                yield config, {"timesteps": timesteps, **mu}
                yield config, {"sigmas": sigmas, "timesteps": timesteps, **mu}


def flow_pair(config, plan):
    ours, reference = pair(FLOW, **config)
    for key in ("sigmas", "timesteps", "sigma_min", "sigma_max", "shift"):
        assert torch.as_tensor(getattr(ours, key)).equal(torch.as_tensor(getattr(reference, key))), key
    for one in (ours, reference):
        one.set_timesteps(**plan)
    assert ours.sigmas.dtype == ours.timesteps.dtype == torch.float32
    assert ours.sigmas.equal(reference.sigmas) and ours.timesteps.equal(reference.timesteps)
    return ours, reference


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_flow_match_euler_is_the_references():
    compared = 0
    for config, plan in sampled(flow_runs(), 500):
        if "shift_terminal" in config and 1 in (plan.get("num_inference_steps"), len(plan.get("sigmas", ""))):
            with pytest.raises(ValueError, match="the last of 1 levels is 1, and can't be stretched"):
                m.FlowMatchEulerDiscreteScheduler(**config).set_timesteps(**plan)
            continue  # NaN there
        ours, reference = flow_pair(config, plan)
        sample, seeds = normal(0), [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
        for t in reference.timesteps[:20]:
            got = ours.step(normal(1), t, sample, generator=seeds[0])
            want = reference.step(normal(1), t, sample, generator=seeds[1])
            check_equal(got, want)
            sample = want.prev_sample
        assert seeds[0].get_state().equal(seeds[1].get_state())
        compared += 1
    assert compared > 450


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stochastic_sampling", [False, True])
def test_flow_match_euler_in_half_precision(dtype, stochastic_sampling):
    """Bit by bit. Noise is added by levels cast last; measured: 1.3 epsilons of the dtype."""
    ours, reference = flow_pair({"stochastic_sampling": stochastic_sampling, "shift": 3.0}, {"num_inference_steps": 7})
    sample, noise = normal(0, dtype=dtype), normal(2, dtype=dtype)
    for t in reference.timesteps:
        seeds = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
        got = ours.scale_noise(sample, t.view(1), noise)
        check_equal(got, reference.scale_noise(sample, t.view(1), noise), 2 * torch.finfo(dtype).eps)
        want = reference.step(normal(1, dtype=dtype), t, sample, generator=seeds[1])
        check_equal(ours.step(normal(1, dtype=dtype), t, sample, generator=seeds[0]), want, 0)
        sample = want.prev_sample


def test_flow_match_euler_adds_noise_where_the_run_stands():
    ours, reference = flow_pair({"shift": 3.0}, {"num_inference_steps": 10})
    x, noise = normal(0), normal(1)
    t = reference.timesteps[[2, 7]]
    check_equal(ours.scale_noise(x, t, noise), reference.scale_noise(x, t, noise), 0)
    for one in (ours, reference):
        one.set_begin_index(4)
    check_equal(ours.scale_noise(x, t, noise), reference.scale_noise(x, t, noise), 0)
    for t_now in reference.timesteps[4:6]:
        check_equal(ours.step(x, t_now, noise), reference.step(x, t_now, noise))
    check_equal(ours.scale_noise(x, t, noise), reference.scale_noise(x, t, noise), 0)
    assert not hasattr(ours, "add_noise") and not hasattr(reference, "add_noise")


@pytest.mark.parametrize("stochastic_sampling", [False, True])
def test_flow_match_euler_steps_every_token_by_its_own_level(stochastic_sampling):
    config = {"stochastic_sampling": stochastic_sampling, "shift": 2.0}
    ours, reference = flow_pair(config, {"num_inference_steps": 10})
    tokens = torch.tensor([[900.0, 450, 0], [1000, 3, 700]])
    x, predicted = normal(0, 2, 3, 5), normal(1, 2, 3, 5)
    t = reference.timesteps[0]
    seeds = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    got, want = (
        one.step(predicted, t, x, generator=seed, per_token_timesteps=tokens)
        for one, seed in zip((ours, reference), seeds, strict=True)
    )
    check_equal(got, want)
    if not stochastic_sampling:  # the direction is the other one: pipelines hand in minus what the model says
        levels, sigmas = (tokens / 1000).flatten().tolist(), ours.sigmas.tolist()
        lower = [max((sigma for sigma in sigmas if sigma < level - 1e-6), default=0) for level in levels]
        expected = x + (tokens / 1000 - torch.tensor(lower).view(2, 3))[..., None] * predicted
        torch.testing.assert_close(got.prev_sample, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"invert_sigmas": True}], ids=str)
def test_flow_match_eulers_order(config):
    """On data N(1, 0.25) beside the exact flow, in float64, as far as sigma 0.3. Measured: 1.00 to 1.02."""

    def spread(sigma):
        return ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5

    def error(n):
        scheduler = m.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(n)
        scheduler.sigmas = scheduler.sigmas.double()
        first = scheduler.sigmas[0]
        x = start = torch.linspace(-3, 3, 9, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[i]
            if (sigma < 0.3) != bool(config.get("invert_sigmas")) and i:
                break
            # the derivative of the exact flow mean + spread z, with mean = 1 - sigma
            slope = (sigma - 0.25 * (1 - sigma)) / spread(sigma)
            x = scheduler.step(-1 + slope * (x - (1 - sigma)) / spread(sigma), t, x).prev_sample
            end = scheduler.sigmas[i + 1]
        exact = (1 - end) + spread(end) * (start - (1 - first)) / spread(first)
        return (x - exact).abs().max().item()

    assert math.log2(error(200) / error(400)) == pytest.approx(1, abs=0.1)


def test_the_references_shift_counts_twice_at_the_lowest_level():
    """Right would be the training's lowest level, shifted once: 0.001 becomes 0.003. The reference's table is shifted,
    and its end is shifted again."""
    scheduler = m.FlowMatchEulerDiscreteScheduler(shift=3.0)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert scheduler.sigma_min == pytest.approx(once, rel=1e-5)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-2].item() == pytest.approx(3 * once / (1 + 2 * once), rel=1e-5)


def test_what_flow_match_euler_cannot_do():
    scheduler, x = m.FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 1, 2, 2)
    for plan in ({}, {"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, {"sigmas": [1.0], "timesteps": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="must say one number of steps"):
            scheduler.set_timesteps(**plan)
    with pytest.raises(ValueError, match="mu is None: use_dynamic_shifting needs it"):
        m.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(5)
    with pytest.raises(ValueError, match="use_exponential_sigmas is true: its levels must be more than 0"):
        m.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True).set_timesteps(sigmas=[1.0, 0.0])
    with pytest.raises(ConfigError, match="use_beta_sigmas=True is not supported: it must be false beside use_karras"):
        m.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ConfigError, match="shift_terminal=1 is not supported"):
        m.FlowMatchEulerDiscreteScheduler(shift_terminal=1)
    scheduler.set_timesteps(5)
    for timestep in (0, torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="is a whole number: pass one of the scheduler's timesteps"):
            scheduler.step(x, timestep, x)
    with pytest.raises(TypeError, match="noise must be a tensor"):
        scheduler.scale_noise(x, scheduler.timesteps[:1])
    with pytest.warns(UserWarning, match="s_churn has no effect"):
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=1.0)
