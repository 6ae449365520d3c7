"""LCM, TCD, DDIM backwards, and the four with a loop of their own, beside the reference's and the mathematics."""

import inspect
import random

import diffusers
import numpy as np
import pytest
import torch
from sampler_parity import STABLE_DIFFUSION, compare_grid, compare_run, product

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
