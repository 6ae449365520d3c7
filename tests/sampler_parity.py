"""A sampler beside the reference's: equal grids, and each step, begun from the reference's sample, equal too."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import diffusers
import torch

import minidiff

BOUND = 1e-6  # of the largest value of the reference's sample
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def product(**axes: Any) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values; a value that is a dict brings several keys."""
    for values in itertools.product(*axes.values()):
        config: dict[str, Any] = {}
        for key, value in zip(axes, values, strict=True):
            config |= value if isinstance(value, dict) else {key: value}
        yield config


def compare_grid(name: str, config: dict[str, Any], plan: dict[str, Any]) -> tuple[Any, Any]:
    """Both, with equal timesteps and sigmas for `set_timesteps(**plan)`."""
    ours, reference = getattr(minidiff, name)(**config), getattr(diffusers, name)(**config)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(**plan)
    where = f"{name} {config} {plan}"
    # KDPM2's timesteps are float64 there at times, which mps hasn't; models read them as float32. Its sigmas end in
    # zeros more than are read.
    timesteps = reference.timesteps.float() if name.startswith("KDPM2") else reference.timesteps
    assert ours.timesteps.dtype == timesteps.dtype, where
    assert ours.timesteps.tolist() == timesteps.tolist(), where
    if hasattr(reference, "sigmas"):
        used, unused = reference.sigmas[: len(ours.sigmas)], reference.sigmas[len(ours.sigmas) :]
        assert ours.sigmas.dtype == used.dtype == torch.float32, where
        assert ours.sigmas.tolist() == used.tolist() and unused.tolist() in ([], [0, 0]), where
    assert float(ours.init_noise_sigma) == float(reference.init_noise_sigma), where
    return ours, reference


def compare_run(
    name: str,
    config: dict[str, Any],
    plan: dict[str, Any] | int,
    *,
    dtype: torch.dtype = torch.float32,
    bound: float = BOUND,
    begin: int = 0,
    end: int | None = None,
    by_index: bool = False,
    **options: Any,
) -> float:
    """Runs both from the grid's place `begin` to `end`, told by set_begin_index if `by_index`, else by the timestep.

    `options` go to `step`. Returns the worst relative difference of a step.

    The reference's sample is given to both before each step, so that differences don't add up, or hide.
    """
    plan = {"num_inference_steps": plan} if isinstance(plan, int) else plan
    ours, reference = compare_grid(name, config, plan)
    for scheduler in (ours, reference) if by_index else ():
        scheduler.set_begin_index(begin)
    noise = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, 3, generator=noise).to(dtype) * float(reference.init_noise_sigma)
    draws = [torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)]
    takes = "generator" in inspect.signature(reference.step).parameters
    generators = [{"generator": one} if takes else {} for one in draws]
    worst = 0.0
    for i, t in enumerate(reference.timesteps[begin:end]):
        where = f"{name} {config} {plan}, step {i + begin}"
        seen, expected = ours.scale_model_input(sample, t), reference.scale_model_input(sample, t)
        assert seen.dtype == expected.dtype and (seen - expected).abs().max() <= bound * expected.abs().max(), where
        predicted = torch.randn(sample.shape, generator=noise).to(dtype)
        got = ours.step(predicted, t, sample, **generators[0], **options)
        want = reference.step(predicted, t, sample, **generators[1], **options)
        assert draws[0].get_state().equal(draws[1].get_state()), where
        for key in want.keys() & set(got.keys()):
            x, y = got[key], want[key]
            if y is None:
                continue
            assert x.dtype == y.dtype and y.isfinite().all(), f"{where}: {key}"
            difference = ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item()
            assert difference <= bound, f"{where}: {key} differs by {difference:.2g}"
            worst = max(worst, difference)
        sample = want.prev_sample
    return worst
