"""The schedulers' mathematics against the mathematics: closed forms in float64, written from the papers.

The schedulers' own tables are float32. Where a test is about `step`, `exact` puts the same numbers there in float64,
so that a formula is right or wrong by far more than rounding.
"""

import functools
import json
import math
from fractions import Fraction
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import minidiff as m
from minidiff.schedulers.pndm import PLMS_WEIGHTS
from minidiff.schedulers.schedule import rescale_zero_terminal_snr

# Float64 against float64. Measured over 400 cases of each: additions and products at most 1e-13, where they are divided
# by a small alpha_bar 3e-12
CLOSE, DIVIDED = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 3e-11, "atol": 3e-11}
SHAPE = (2, 3, 2, 2)
SCHEDULERS = (m.DDPMScheduler, m.DDIMScheduler, m.PNDMScheduler)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

seeds = st.integers(0, 2**31)
unclipped = {"clip_sample": False}


@st.composite
def schedules(draw, names=SCHEDULES):
    """The keys of a noise schedule that float32 can resolve."""
    start = draw(st.floats(1e-4, 1e-2))
    return {
        "num_train_timesteps": draw(st.integers(2, 1000)),
        "beta_schedule": draw(st.sampled_from(names)),
        "beta_start": start,
        "beta_end": draw(st.floats(start, 0.03)),
    }


@st.composite
def runs(draw, spacings=SPACINGS, most=100):
    """A schedule and a number of steps, `most` at most, whose timesteps stay within it."""
    config = draw(schedules())
    T = config["num_train_timesteps"]
    n = draw(st.integers(1, min(T, most)))
    config["timestep_spacing"] = spacing = draw(st.sampled_from(spacings))
    config["steps_offset"] = draw(st.integers(0, T - 1 - (n - 1) * (T // n))) if spacing == "leading" else 0
    assume(spacing != "trailing" or len(np.arange(T, 0, -T / n)) == n)
    return config, n


def exact(scheduler):
    """The same scheduler, with its tables in float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape or SHAPE))


def closed_form_betas(beta_schedule, num_train_timesteps, beta_start, beta_end):
    """float64, from the papers' definitions."""
    T = num_train_timesteps
    u = np.arange(T) / (T - 1)
    if beta_schedule == "linear":
        return beta_start + (beta_end - beta_start) * u
    if beta_schedule == "scaled_linear":
        return (math.sqrt(beta_start) + (math.sqrt(beta_end) - math.sqrt(beta_start)) * u) ** 2
    if beta_schedule == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1 + np.exp(6 - 12 * u))
    t = np.arange(T + 1) / T
    if beta_schedule == "laplace":  # log SNR is Laplace's quantile function of 1 - t, of scale 1/2
        with np.errstate(divide="ignore"):
            log_snr = np.where(t <= 0.5, -np.log(2 * t + 1e-6), np.log(2 - 2 * t + 1e-6)) / 2
        alpha_bar = (1 + np.exp(-log_snr)) ** -0.5
    else:
        alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def noised(alpha_bar, x0, eps):
    """DDPM, eq. 4."""
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps


def said(prediction_type, alpha_bar, x0, eps):
    """What a model that knows x0 and eps says."""
    velocity = math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": velocity}[prediction_type]


def alpha_bar_at(scheduler, t):
    """Before timestep 0 it is 1, or timestep 0's where set_alpha_to_one is false."""
    to_one = t < 0 and scheduler.config.get("set_alpha_to_one", True)
    return 1.0 if to_one else scheduler.alphas_cumprod[max(t, 0)].item()


# The forward process


@given(schedules((*SCHEDULES, "sigmoid", "laplace")))
def test_betas_are_the_closed_form_and_the_snr_falls_strictly(config):
    scheduler = m.DDPMScheduler(**config)
    betas = closed_form_betas(**config)
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-6)  # measured: 4e-7, float32's own rounding
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=5e-5)  # 1.5e-5
    alpha_bar = scheduler.alphas_cumprod.double()
    assert ((alpha_bar / (1 - alpha_bar)).diff() < 0).all()


@given(schedules())
def test_steps_of_the_forward_process_compose_to_add_noise(config):
    """q(x_t | x_(t-1)) = N(sqrt(1 - beta) x, beta), composed t times, has the mean and variance of eq. 4."""
    scheduler = m.DDPMScheduler(**config)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    mean, variance = np.ones(()), np.zeros(())
    means, variances = [], []
    for beta in scheduler.betas.double().numpy():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    every_t = torch.arange(len(scheduler))
    ones, zeros = (make(len(scheduler), 1, dtype=torch.float64) for make in (torch.ones, torch.zeros))
    np.testing.assert_allclose(scheduler.add_noise(ones, zeros, every_t)[:, 0], means, **CLOSE)
    np.testing.assert_allclose(scheduler.add_noise(zeros, ones, every_t)[:, 0] ** 2, variances, **CLOSE)


@given(schedules(), seeds, st.data())
def test_noise_and_velocity_turn_about_an_angle(config, seed, data):
    """x_t and v are (x0, eps) turned by the angle whose cosine is sqrt(alpha_bar): x0 and eps are found again."""
    scheduler = exact(m.DDIMScheduler(**config))
    t = torch.tensor(data.draw(st.lists(st.integers(0, len(scheduler) - 1), min_size=2, max_size=2)))
    x0, eps = normal(seed), normal(seed + 1)
    x_t, v = scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)
    angle = scheduler.alphas_cumprod[t].sqrt().acos().view(-1, 1, 1, 1)
    torch.testing.assert_close(angle.cos() * x_t - angle.sin() * v, x0, **CLOSE)
    torch.testing.assert_close(angle.sin() * x_t + angle.cos() * v, eps, **CLOSE)
    one = scheduler.add_noise(x0[:1], eps[:1], t[0])  # one timestep may stand for all
    torch.testing.assert_close(one, x_t[:1], rtol=0, atol=0)


@given(schedules())
def test_zero_terminal_snr_ends_at_0_and_keeps_the_first_value(config):
    before = m.DDIMScheduler(**config).alphas_cumprod.double().sqrt()
    scheduler = m.DDIMScheduler(**config, rescale_betas_zero_snr=True)
    after = scheduler.alphas_cumprod.double().sqrt()
    assert after[-1] == 0
    assert abs(after[0] - before[0]) < 1e-6
    assert (after.diff() < 0).all()
    line = (before - before[-1]) * before[0] / (before[0] - before[-1])
    torch.testing.assert_close(after, line, rtol=1e-3, atol=1e-5)
    assert torch.equal(scheduler.betas, rescale_zero_terminal_snr(m.DDIMScheduler(**config).betas))


# DDIM


@given(runs(), st.sampled_from(PREDICTIONS), st.booleans(), seeds)
@example(({"num_train_timesteps": 1000, "rescale_betas_zero_snr": True}, 7), "v_prediction", True, 0)
def test_a_ddim_step_lands_on_the_forward_process(run, prediction_type, set_alpha_to_one, seed):
    """For the true noise every step of DDIM is `add_noise` at t - T // n, and the last one at the final alpha_bar."""
    config, n = run
    scheduler = exact(
        m.DDIMScheduler(**config, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, **unclipped)
    )
    scheduler.set_timesteps(n)
    x0, eps = normal(seed), normal(seed + 1)
    for t in scheduler.timesteps.tolist():
        alpha_bar = alpha_bar_at(scheduler, t)
        t_prev = t - len(scheduler) // n
        out = scheduler.step(said(prediction_type, alpha_bar, x0, eps), t, noised(alpha_bar, x0, eps))
        expected = noised(alpha_bar_at(scheduler, t_prev), x0, eps)
        torch.testing.assert_close(out.prev_sample, expected, **DIVIDED)
        torch.testing.assert_close(out.pred_original_sample, x0, **DIVIDED)


@given(runs(("leading",)), st.sampled_from(PREDICTIONS), seeds)
def test_ddim_inverts(run, prediction_type, seed):
    """With one eps throughout, a run goes along x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) eps = constant, so
    that the forward process, from where it ends, leads back to where it began."""
    config, n = run
    scheduler = exact(m.DDIMScheduler(**config, prediction_type=prediction_type, set_alpha_to_one=False, **unclipped))
    assume(scheduler.alphas_cumprod[-1] > 1e-6)
    scheduler.set_timesteps(n)
    eps = normal(seed)
    start = sample = normal(seed + 1)
    for t in scheduler.timesteps.tolist():
        alpha_bar = alpha_bar_at(scheduler, t)
        x0 = (sample - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        sample = scheduler.step(said(prediction_type, alpha_bar, x0, eps), t, sample).prev_sample
    t_last = scheduler.timesteps[-1].item() - len(scheduler) // n
    alpha_bar = alpha_bar_at(scheduler, t_last)
    x0 = (sample - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    back = noised(alpha_bar_at(scheduler, scheduler.timesteps[0].item()), x0, eps)
    torch.testing.assert_close(back, start, **CLOSE)


@given(runs(), st.floats(0, 1), seeds, st.data())
def test_ddims_eta_is_the_share_of_the_posteriors_deviation(run, eta, seed, data):
    """Eq. 16: noise of eta times the posterior's deviation, and what is left of 1 - alpha_bar_prev along eps."""
    config, n = run
    scheduler = exact(m.DDIMScheduler(**config, **unclipped))
    scheduler.set_timesteps(n)
    t = data.draw(st.sampled_from(scheduler.timesteps.tolist()))
    a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t - len(scheduler) // n)
    x0, eps, z = normal(seed), normal(seed + 1), normal(seed + 2)
    _, variance = posterior(a, b)
    expected = math.sqrt(b) * x0 + eta * math.sqrt(variance) * z + math.sqrt(1 - b - eta**2 * variance) * eps
    got = scheduler.step(eps, t, noised(a, x0, eps), eta=eta, variance_noise=z).prev_sample
    torch.testing.assert_close(got, expected, **DIVIDED)


# DDPM


def posterior(alpha_bar, alpha_bar_prev):
    """q(x_prev | x_t, x0) by Bayes' rule: the product of two Gaussians in x_prev, N(x_t / sqrt(alpha), beta / alpha)
    and N(sqrt(alpha_bar_prev) x0, 1 - alpha_bar_prev). Returns mean(x_t, x0), and the variance."""
    alpha = alpha_bar / alpha_bar_prev
    if alpha_bar_prev == 1:  # the second is a point
        return lambda x_t, x0: x0, 0.0
    precisions = alpha / (1 - alpha), 1 / (1 - alpha_bar_prev)
    variance = 1 / sum(precisions)

    def mean(x_t, x0):
        return variance * (precisions[0] * x_t / math.sqrt(alpha) + precisions[1] * math.sqrt(alpha_bar_prev) * x0)

    return mean, variance


def drawn(seed, shape=SHAPE):
    """The noise that a step draws in float64 from this seed, and the generator to give it."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise, torch.Generator().manual_seed(seed)


VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None)


@pytest.mark.parametrize("variance_type", VARIANCES)
@given(runs(), st.sampled_from(PREDICTIONS), seeds, st.data())
def test_a_ddpm_step_is_the_posterior_of_bayes_rule(variance_type, run, prediction_type, seed, data):
    config, n = run
    scheduler = exact(
        m.DDPMScheduler(**config, prediction_type=prediction_type, variance_type=variance_type, **unclipped)
    )
    scheduler.set_timesteps(n)
    grid = scheduler.timesteps.tolist()
    i = data.draw(st.integers(0, n - 1))
    t, t_prev = grid[i], grid[i + 1] if i + 1 < n else -1
    a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t_prev)
    x0, eps = normal(seed), normal(seed + 1)
    x_t = noised(a, x0, eps)
    mean, beta_tilde = posterior(a, b)
    beta = 1 - a / b

    output = said(prediction_type, a, x0, eps)
    share = torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 1, SHAPE))  # of the way to beta, in logarithms
    variance = {"fixed_large": beta, "learned": share}.get(variance_type, beta_tilde)
    if variance_type == "learned":
        output = torch.cat([output, share], dim=1)
    if variance_type == "learned_range":
        output = torch.cat([output, 2 * share - 1], dim=1)
        variance = beta**share * max(beta_tilde, 1e-20) ** (1 - share)
    z, generator = drawn(seed)
    expected = mean(x_t, x0) + (torch.as_tensor(variance) ** 0.5 * z if t > 0 else 0)
    out = scheduler.step(output, t, x_t, generator=generator)
    torch.testing.assert_close(out.prev_sample, expected, rtol=1e-7, atol=1e-7)  # 9e-8: a root of what is near 0
    torch.testing.assert_close(out.pred_original_sample, x0, **DIVIDED)


@given(schedules(), st.integers(1, 50), st.sampled_from(PREDICTIONS), seeds, st.data())
def test_ddim_with_eta_1_is_ddpm(config, n, prediction_type, seed, data):
    """Mean and variance, over the same pair of timesteps (DDIM, section 4.1)."""
    T = config["num_train_timesteps"] = n * data.draw(st.integers(1, 20))
    assume(T > 1)
    config |= {"prediction_type": prediction_type, **unclipped}
    ddim, ddpm = exact(m.DDIMScheduler(**config)), exact(m.DDPMScheduler(**config))
    ddim.set_timesteps(n)
    ddpm.set_timesteps(n)
    assert ddim.timesteps.tolist() == ddpm.timesteps.tolist()
    t = data.draw(st.sampled_from(ddim.timesteps.tolist()))
    output, sample = normal(seed), normal(seed + 1)
    z, generator = drawn(seed)
    out = ddim.step(output, t, sample, eta=1.0, variance_noise=z)
    expected = ddpm.step(output, t, sample, generator=generator)
    torch.testing.assert_close(out.prev_sample, expected.prev_sample, **DIVIDED)
    torch.testing.assert_close(out.pred_original_sample, expected.pred_original_sample, **DIVIDED)


@given(runs(), st.sampled_from((m.DDPMScheduler, m.DDIMScheduler)), seeds, st.data())
def test_three_forms_of_one_prediction_give_one_step(run, cls, seed, data):
    config, n = run
    bound = data.draw(st.sampled_from((unclipped, {"clip_sample": True}, {"thresholding": True})))
    x0, eps = normal(seed), normal(seed + 1)
    t, results = None, []
    for prediction_type in PREDICTIONS:
        scheduler = exact(cls(**config, prediction_type=prediction_type, **bound))
        scheduler.set_timesteps(n)
        t = data.draw(st.sampled_from(scheduler.timesteps.tolist())) if t is None else t
        alpha_bar = alpha_bar_at(scheduler, t)
        output, sample = said(prediction_type, alpha_bar, x0, eps), noised(alpha_bar, x0, eps)
        results.append(scheduler.step(output, t, sample, generator=torch.Generator().manual_seed(0)))
    for other in results[1:]:
        torch.testing.assert_close(other.prev_sample, results[0].prev_sample, **DIVIDED)
        torch.testing.assert_close(other.pred_original_sample, results[0].pred_original_sample, **DIVIDED)


# PNDM


@functools.cache
def adams_bashforth(k):
    """The weights w with sum_j w_j p(-j) = the integral of p over 0..1 for every polynomial p of degree below k."""
    rows = [[Fraction((-j) ** degree) for j in range(k)] + [Fraction(1, degree + 1)] for degree in range(k)]
    for i in range(k):  # Gauss and Jordan
        pivot = next(r for r in range(i, k) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for r in set(range(k)) - {i}:
            rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


@pytest.mark.parametrize("k", (1, 2, 3, 4))
def test_plms_weights_integrate_polynomials_exactly(k):
    weights, divisor = PLMS_WEIGHTS[k - 1]
    assert [Fraction(w, divisor) for w in weights] == adams_bashforth(k)


def pndm_by_the_paper(scheduler, n, model, x):
    """PNDM's run by eq. 11 to 13, with the averages of what the model says, be it eps or v. The transfer phi is DDIM's
    step, which eq. 11 is another form of. Timesteps are `leading`, and the middle of an odd step is rounded as in the
    reference: the sample moves to t - stride // 2, the model is called at the next timestep + stride // 2."""
    stride = len(scheduler) // n
    grid = [i * stride + scheduler.config.steps_offset for i in reversed(range(n))]
    history = []

    def phi(x, said, t, t_next):
        a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t_next)
        if scheduler.config.prediction_type == "v_prediction":
            said = math.sqrt(a) * said + math.sqrt(1 - a) * x
        return math.sqrt(b) * (x - math.sqrt(1 - a) * said) / math.sqrt(a) + math.sqrt(1 - b) * said

    for i, t in enumerate(grid):
        t_next, t_mid = t - stride, t - stride + stride // 2
        e1 = model(x, t)
        history.append(e1)
        if not scheduler.config.skip_prk_steps and i < 3:
            e2 = model(phi(x, e1, t, t - stride // 2), t_mid)
            e3 = model(phi(x, e2, t, t_mid), t_mid)
            e4 = model(phi(x, e3, t, t_next), t_next)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif i == 0 and n > 1:  # without PRK: Heun's second order
            e = (e1 + model(phi(x, e1, t, t_next), t_next)) / 2
        else:
            weights = adams_bashforth(min(4, len(history)))
            e = sum(float(w) * past for w, past in zip(weights, reversed(history), strict=False))
        x = phi(x, e, t, t_next)
    return x


@given(runs(("leading",)), st.sampled_from(("epsilon", "v_prediction")), st.booleans(), st.booleans(), seeds)
def test_pndm_is_the_papers_run(run, prediction_type, skip_prk_steps, set_alpha_to_one, seed):
    config, n = run
    assume(skip_prk_steps or n >= 4)
    config |= {"prediction_type": prediction_type, "skip_prk_steps": skip_prk_steps}
    scheduler = exact(m.PNDMScheduler(**config, set_alpha_to_one=set_alpha_to_one))
    assume(scheduler.alphas_cumprod[-1] > 1e-6)

    seen = []

    def model(x, t):
        seen.append((t, x))
        return (x + t).sin()

    expected = pndm_by_the_paper(scheduler, n, model, normal(seed))
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == [t for t, _ in seen]
    sample = normal(seed)
    for t, x in seen:
        torch.testing.assert_close(sample, x, **DIVIDED)
        sample = scheduler.step((sample + t).sin(), t, sample).prev_sample
    torch.testing.assert_close(sample, expected, **DIVIDED)


# Convergence, on data whose score is known


FINE = {"num_train_timesteps": 20_000, "beta_start": 5e-6, "beta_end": 1e-3}  # Ho's schedule, on a finer clock
END = 4_000  # where the runs stop: in the last steps the curve of x over t has no bound on its second derivative
MIXTURE = [(0.3, -1.5, 0.4), (0.7, 1.0, 0.6)]  # weight, mean, deviation


class Gaussian:
    """N(1, 0.25). The flow keeps each point's distance from the mean, measured in deviations."""

    def moments(self, alpha_bar):
        return math.sqrt(alpha_bar), math.sqrt(0.25 * alpha_bar + 1 - alpha_bar)

    def eps(self, x, alpha_bar):
        mean, deviation = self.moments(alpha_bar)
        return math.sqrt(1 - alpha_bar) * (x - mean) / deviation**2

    def flow(self, x, alpha_bar, alpha_bar_end):
        (mean, deviation), (mean_end, deviation_end) = self.moments(alpha_bar), self.moments(alpha_bar_end)
        return mean_end + deviation_end * (x - mean) / deviation


class Mixture:
    """Two Gaussians on a line. The flow keeps the order of points, and so each point's quantile."""

    def parts(self, x, alpha_bar):
        for weight, mean, deviation in MIXTURE:
            scale = math.sqrt(deviation**2 * alpha_bar + 1 - alpha_bar)
            z = (x - math.sqrt(alpha_bar) * mean) / scale
            density = weight * (-(z**2) / 2).exp() / scale
            yield density, density * -z / scale, weight * torch.special.ndtr(z)

    def eps(self, x, alpha_bar):
        densities, slopes, _ = zip(*self.parts(x, alpha_bar), strict=True)
        return -math.sqrt(1 - alpha_bar) * sum(slopes) / sum(densities)

    def quantile(self, x, alpha_bar):
        return sum(share for *_, share in self.parts(x, alpha_bar))

    def flow(self, x, alpha_bar, alpha_bar_end):
        wanted, low, high = self.quantile(x, alpha_bar), torch.full_like(x, -10), torch.full_like(x, 10)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.quantile(middle, alpha_bar_end) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


def global_error(scheduler, data, n, start):
    """The largest distance at timestep END of a run of n steps from the exact flow through the same `start`."""
    scheduler.set_timesteps(n)
    x = start
    for t in scheduler.timesteps.tolist():
        if t == END:
            break
        alpha_bar = alpha_bar_at(scheduler, t)
        output = data.eps(x, alpha_bar)
        x0 = (x - math.sqrt(1 - alpha_bar) * output) / math.sqrt(alpha_bar)
        output = said(scheduler.config.prediction_type, alpha_bar, x0, output)
        x = scheduler.step(output, t, x).prev_sample
    first, last = (alpha_bar_at(scheduler, t) for t in (scheduler.timesteps[0].item(), END))
    return (x - data.flow(start, first, last)).abs().max().item()


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize(
    ("cls", "config", "order"),
    (
        (m.DDIMScheduler, unclipped, 1),
        (m.PNDMScheduler, {"skip_prk_steps": True}, 2),
        (m.PNDMScheduler, {"skip_prk_steps": False}, 2),
        (m.DDIMScheduler, {**unclipped, "prediction_type": "v_prediction"}, 1),
        (m.PNDMScheduler, {"skip_prk_steps": True, "prediction_type": "v_prediction"}, 1),
        (m.PNDMScheduler, {"skip_prk_steps": True, "prediction_type": "sample"}, 2),
        (m.PNDMScheduler, {"skip_prk_steps": False, "prediction_type": "sample"}, 2),
    ),
    ids=("ddim", "plms", "prk", "ddim-v", "plms-v", "plms-x0", "prk-x0"),
)
def test_the_error_falls_with_the_samplers_order(cls, config, order, data):
    """An average of v's of several timesteps is none of their eps: it costs PNDM, the reference's too, an order."""
    scheduler = exact(cls(**FINE, **config))
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    errors = [global_error(scheduler, data, n, start) for n in (50, 100, 200, 400)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.1)


def error_at_the_end(data, grid, step, scheduler):
    """Of a whole run, `step` by `step`, from timestep grid[0] to the alpha_bar before timestep 0."""
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1)
    for t, t_next in zip(grid, [*grid[1:], -1], strict=True):
        x = step(data.eps(x, alpha_bar_at(scheduler, t)), t, t_next, x)
    first, last = (alpha_bar_at(scheduler, t) for t in (grid[0], -1))
    return (x - data.flow(start, first, last)).abs().max().item()


@pytest.mark.parametrize("data", (Gaussian(), Mixture()), ids=("gaussian", "mixture"))
@pytest.mark.parametrize("timestep_spacing", ("trailing", "linspace"))
@pytest.mark.parametrize(
    ("cls", "config"),
    ((m.DDIMScheduler, unclipped), (m.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True})),
    ids=("ddim", "plms"),
)
def test_the_references_stride_is_another_than_the_grids(cls, config, timestep_spacing, data):
    """They step by T // n, which here isn't the way to the next timestep, and with more steps the error grows. Measured
    at 200 and 600 steps of 1000: DDIM 0.015 and 0.61, PNDM 0.0004 (trailing, where 200 divides T) and 0.61. DDIM from
    each timestep to the next, which would be right: 0.015 and 0.005."""
    scheduler = exact(cls(**config, timestep_spacing=timestep_spacing))

    def right(eps, t, t_next, x):
        a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t_next)
        return noised(b, (x - math.sqrt(1 - a) * eps) / math.sqrt(a), eps)

    def given_step(eps, t, t_next, x):
        return scheduler.step(eps, t, x).prev_sample

    errors, right_errors = [], []
    for n in (200, 600):
        scheduler.set_timesteps(n)
        grid = scheduler.timesteps.tolist()
        errors.append(error_at_the_end(data, grid, given_step, scheduler))
        right_errors.append(error_at_the_end(data, sorted({*grid}, reverse=True), right, scheduler))
    assert errors[1] > 10 * errors[0]
    assert right_errors[1] < 0.5 * right_errors[0]


# Stochastic samplers: 20,000 chains side by side, whose moments must be the data's within 5 standard errors


CHAINS, DEVIATIONS = 20_000, 5  # a right sampler misses by more once in a million draws; the seeds are fixed


def check_moments(samples, mean, covariance):
    """`samples` (N, d) in float64. The standard error of a mean is sqrt(S_ii / N), of a covariance Wishart's."""
    diagonal = covariance.diagonal()
    assert ((samples.mean(0) - mean).abs() <= DEVIATIONS * (diagonal / len(samples)).sqrt() + 1e-6).all()
    error = ((diagonal[:, None] * diagonal[None] + covariance**2) / len(samples)).sqrt()
    assert ((samples.T.cov() - covariance).abs() <= DEVIATIONS * error + 1e-6).all()


MEAN = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("n", (3, 25, 100))
@pytest.mark.parametrize("timestep_spacing", SPACINGS)
@pytest.mark.parametrize("variance_type", ("fixed_large", "fixed_small", "learned"))
def test_ddpm_draws_from_the_data(variance_type, timestep_spacing, n):
    """Exactly, with any number of steps: `fixed_large` for data of variance 1, `fixed_small` for a point (Ho et al.,
    section 3.2), and `learned`, told the variance of x_prev given x_t, for any independent Gaussians."""
    keys = {"num_train_timesteps": 100, "beta_end": 0.3, "timestep_spacing": timestep_spacing}
    scheduler = exact(m.DDPMScheduler(**keys, variance_type=variance_type, **unclipped))
    scheduler.set_timesteps(n)
    variance = {"fixed_large": 1.0, "fixed_small": 0.0, "learned": torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)}
    variance = torch.ones(3, dtype=torch.float64) * variance[variance_type]
    generator = torch.Generator().manual_seed(n)
    grid = scheduler.timesteps.tolist()
    a = alpha_bar_at(scheduler, grid[0])
    x = torch.randn(CHAINS, 3, generator=generator, dtype=torch.float64)
    x = x * (a * variance + 1 - a) ** 0.5 + math.sqrt(a) * MEAN
    for t, t_prev in zip(grid, [*grid[1:], -1], strict=True):
        a, b = alpha_bar_at(scheduler, t), alpha_bar_at(scheduler, t_prev)
        output = eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * variance + 1 - a)
        if variance_type == "learned":
            mean, beta_tilde = posterior(a, b)
            of_x0 = variance * (1 - a) / (a * variance + 1 - a)  # given x_t
            output = torch.cat([eps, (beta_tilde + mean(0.0, 1.0) ** 2 * of_x0).expand_as(eps)], dim=1)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    if grid[-1] == 0:  # the last step draws nothing, and leaves the mean of x0 given x_0
        a = alpha_bar_at(scheduler, 0)
        variance = variance * a * variance / (a * variance + 1 - a)
    check_moments(x, MEAN, variance.diag())


COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)


def run_of_ddim(eta, n, x, generator):
    """DDIM on N(MEAN, COVARIANCE) from `x` (N, 3), whose linear model is exact."""
    keys = {"beta_end": 0.02, "timestep_spacing": "trailing"}
    scheduler = exact(m.DDIMScheduler(**keys, **unclipped))
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps.tolist():
        a = alpha_bar_at(scheduler, t)
        precision = torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(3))
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) @ precision
        x = scheduler.step(eps, t, x, eta=eta, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_ddim_draws_from_the_data(eta):
    """Mean and full covariance after 500 steps, for all eta; the steps' own error is by then below the bound."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(CHAINS, 3, generator=generator, dtype=torch.float64)
    check_moments(run_of_ddim(eta, 500, x, generator), MEAN, COVARIANCE)


# Bounds, state, and what comes back


@given(schedules(), st.sampled_from(SCHEDULERS), st.sampled_from(SPACINGS), st.integers(0, 3), st.data())
def test_timesteps_are_the_references_and_never_leave_the_range(config, cls, spacing, offset, data):
    T = config["num_train_timesteps"]
    n = data.draw(st.integers(1, T))
    config |= {"timestep_spacing": spacing, "steps_offset": offset}
    if cls is m.PNDMScheduler:
        config["skip_prk_steps"] = skip = data.draw(st.booleans())
        assume(skip or n >= 4)
    reference = getattr(diffusers, cls.__name__)(**config)
    reference.set_timesteps(n)
    expected, scheduler = reference.timesteps.tolist(), cls(**config)
    if min(expected) < 0 or max(expected) >= T:
        with pytest.raises(ValueError, match=f"num_inference_steps={n}.*leave 0..{T - 1}"):
            scheduler.set_timesteps(n)
    else:
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == expected
        assert scheduler.timesteps.dtype == torch.int64
        repeats = cls is m.PNDMScheduler
        assert all(t > t_next or (repeats and t == t_next) for t, t_next in pairwise(expected))


@given(runs(), st.sampled_from((m.DDPMScheduler, m.DDIMScheduler)), st.floats(0.1, 3), st.booleans(), st.data(), seeds)
def test_x0_is_bounded(run, cls, bound, thresholding, data, seed):
    """clip_sample: to the range. thresholding: to [-1, 1], scaled by a quantile of each sample's own."""
    config, n = run
    if thresholding:
        config |= {"thresholding": True, "sample_max_value": 1 + bound, "dynamic_thresholding_ratio": 0.9}
    else:
        config |= {"clip_sample": True, "clip_sample_range": bound}
    scheduler = cls(**config, prediction_type="sample")
    scheduler.set_timesteps(n)
    said = data.draw(st.sampled_from((0.3, 0.7, 1, 3))) * normal(seed)
    x0 = scheduler.step(said, scheduler.timesteps[0], normal(seed + 1)).pred_original_sample
    expected = said.clamp(-bound, bound)
    if thresholding:
        limits = np.clip(np.quantile(said.abs().flatten(1).numpy(), 0.9, axis=1), 1, 1 + bound)[:, None, None, None]
        expected = torch.from_numpy(np.clip(said.numpy(), -limits, limits) / limits)
        assert x0.abs().max() <= 1
    torch.testing.assert_close(x0, expected, **CLOSE)


def whole_run(scheduler, n, x, stop_after=None, dtype=torch.float32):
    """From `x` with a model that depends on sample and timestep, and a generator of seed 0."""
    scheduler.set_timesteps(n)
    x, options = x.to(dtype), {}
    if not isinstance(scheduler, m.PNDMScheduler):
        options["generator"] = torch.Generator().manual_seed(0)
    if isinstance(scheduler, m.DDIMScheduler):
        options["eta"] = 0.5
    for t in scheduler.timesteps.tolist()[:stop_after]:
        x = scheduler.step((x + t).sin(), t, x, **options).prev_sample
    return x


@given(st.sampled_from(SCHEDULERS), st.booleans(), st.integers(4, 12), st.integers(0, 12), st.integers(4, 12), seeds)
def test_set_timesteps_clears_all_state(cls, skip_prk_steps, n, stop_after, n_before, seed):
    """A run broken off anywhere leaves nothing behind; nor does one of another scheduler of the same config."""
    config = {"skip_prk_steps": skip_prk_steps} if cls is m.PNDMScheduler else {}
    used, fresh, other = cls(**config), cls(**config), cls(**config)
    whole_run(used, n_before, normal(seed), stop_after)
    whole_run(other, n_before, normal(seed + 1), stop_after)
    assert torch.equal(whole_run(used, n, normal(seed + 2)), whole_run(fresh, n, normal(seed + 2)))


@given(st.sampled_from(SCHEDULERS), st.booleans(), st.integers(4, 12), seeds)
def test_two_schedulers_never_share_state(cls, skip_prk_steps, n, seed):
    """Step by step in turns they give what each gives alone."""
    config = {"skip_prk_steps": skip_prk_steps} if cls is m.PNDMScheduler else {}
    pair, samples = (cls(**config), cls(**config)), [normal(seed), normal(seed + 1)]
    expected = [whole_run_without_noise(cls(**config), n, x) for x in samples]
    for scheduler in pair:
        scheduler.set_timesteps(n)
    for t in pair[0].timesteps.tolist():
        samples = [deterministic_step(s, t, x) for s, x in zip(pair, samples, strict=True)]
    assert all(torch.equal(got, want) for got, want in zip(samples, expected, strict=True))


def deterministic_step(scheduler, t, x):
    options = {"generator": torch.Generator().manual_seed(t)} if isinstance(scheduler, m.DDPMScheduler) else {}
    return scheduler.step((x + t).sin(), t, x, **options).prev_sample


def whole_run_without_noise(scheduler, n, x):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps.tolist():
        x = deterministic_step(scheduler, t, x)
    return x


@given(
    st.sampled_from(SCHEDULERS),
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from(({"clip_sample": True}, unclipped, {"thresholding": True})),
    st.permutations(range(4)),
    seeds,
)
def test_shape_dtype_device_and_batch_order_are_kept(cls, dtype, dims, bound, order, seed):
    """Each sample is its own: the batch's order changes nothing. Meta tensors stand for another device."""
    config = {"skip_prk_steps": True} if cls is m.PNDMScheduler else bound
    shape = (4, 2, *dims)
    x, output = normal(seed, *shape).to(dtype), normal(seed + 1, *shape).to(dtype)
    results = []
    for rows in (slice(None), list(order)):
        scheduler = cls(**config)
        scheduler.set_timesteps(7)
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        generators = generators if rows == slice(None) else [generators[i] for i in order]
        options = {} if cls is m.PNDMScheduler else {"generator": generators}
        t = scheduler.timesteps[0].item()
        out = scheduler.step(output[rows], t, x[rows], **options)
        results.append(out.prev_sample)
    assert results[0].shape == shape
    assert results[0].dtype == dtype
    assert torch.equal(results[0][list(order)], results[1])
    scheduler.set_timesteps(7, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    on_meta = scheduler.step(output.to("meta"), t, x.to("meta")).prev_sample
    assert (on_meta.device.type, on_meta.shape, on_meta.dtype) == ("meta", shape, dtype)
    assert scheduler.add_noise(x, output, torch.tensor([3])).dtype == dtype


@given(schedules(), st.sampled_from(SCHEDULERS), st.sampled_from(SCHEDULERS), st.data())
def test_configs_go_through_json_and_through_other_schedulers(config, cls, other, data):
    config["steps_offset"] = data.draw(st.integers(0, 5))
    config["timestep_spacing"] = data.draw(st.sampled_from(SPACINGS))
    if data.draw(st.booleans()):
        config["trained_betas"] = [0.01] * config["num_train_timesteps"]
    if cls is m.PNDMScheduler:
        config["set_alpha_to_one"] = data.draw(st.booleans())
    else:
        config["clip_sample"] = data.draw(st.booleans())
        config["rescale_betas_zero_snr"] = data.draw(st.booleans())
    scheduler = cls(**config)
    again = cls.from_config(json.loads(json.dumps(dict(scheduler.config))))
    back = cls.from_config(other.from_config(scheduler.config).config)
    for copy in (again, back):
        assert dict(copy.config) == dict(scheduler.config)
        assert torch.equal(copy.alphas_cumprod, scheduler.alphas_cumprod)
        assert torch.equal(copy.final_alpha_cumprod, scheduler.final_alpha_cumprod)
    swapped = other.from_config(scheduler.config)
    assert all(swapped.config[key] == scheduler.config[key] for key in config)
