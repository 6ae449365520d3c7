"""The sampler of EDM's models beside the reference's, alone and in Playground 2.5's pipeline."""

import diffusers
import pytest
import torch
from layouts import make_folder
from sampler_parity import compare_grid, compare_run, product
from test_pipelines import PROMPT
from test_xl import both, compare

import minidiff as m

NAME = "EDMDPMSolverMultistepScheduler"
AXES = {
    "sigma_schedule": ("karras", "exponential"),
    "prediction_type": ("epsilon", "v_prediction"),
    "order": ({"solver_order": 1}, {}, {"solver_type": "heun"}, {"solver_order": 3}),
    "final_sigmas_type": ("zero", "sigma_min"),
    "options": (
        {},
        {"lower_order_final": False},
        {"euler_at_final": True},
        {"thresholding": True, "sample_max_value": 1.5},
        {"sigma_min": 0.1, "sigma_max": 5.0, "sigma_data": 1.0, "rho": 3.0},
    ),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
}
CONFIGS = [c for c in product(**AXES) if (c["algorithm_type"], c.get("solver_order")) != ("sde-dpmsolver++", 3)]


def raises(config, n):
    """Where order 3, or Heun's rule, would divide by the length of a last step that has none."""
    if config["final_sigmas_type"] == "zero" or (n < 15 and config.get("lower_order_final", True)):
        return False
    high = min(n, config.get("solver_order", 2)) == 3 or (n > 1 and config.get("solver_type") == "heun")
    return high and not config.get("euler_at_final", False)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_steps(n):
    tried = 0
    for config in CONFIGS:
        if raises(config, n):
            with pytest.raises(ValueError, match="the last step ends where it begins"):
                m.EDMDPMSolverMultistepScheduler(**config).set_timesteps(n)
        else:
            compare_run(NAME, config, n)
            tried += 1
    assert tried > 50


def test_before_a_run_and_midway():
    ours, reference = m.EDMDPMSolverMultistepScheduler(), diffusers.EDMDPMSolverMultistepScheduler()
    assert torch.equal(ours.sigmas, reference.sigmas) and torch.equal(ours.timesteps, reference.timesteps)
    compare_run(NAME, {}, 8, begin=3, by_index=True)
    ours, reference = compare_grid(NAME, {}, {"num_inference_steps": 6})
    x, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), reference.timesteps[[2, 5]]
    assert torch.equal(ours.add_noise(x, noise, t), reference.add_noise(x, noise, t))


def test_the_denoiser_is_the_papers():
    """x0 = c_skip x + c_out F: a network that knows normal data of deviation sigma_data has F = 0 everywhere, and the
    step is then exact for order 1: x' / x is that of the data's own path, in the limit of small steps."""
    scheduler = m.EDMDPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(2000)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * float(scheduler.sigmas[0])
    start = x.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    exact = start * ((0.002**2 + 0.5**2) / (80.0**2 + 0.5**2)) ** 0.5
    assert abs((x / exact).item() - 1) < 5e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min"),
        ({"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order"),
    ],
)
def test_configs_that_cannot_be(config, message):
    with pytest.raises(m.ConfigError, match=message):
        m.EDMDPMSolverMultistepScheduler(**config)


def test_in_xl_with_latents_of_a_mean(tmp_path, edit_json):
    """Playground 2.5: EDM's levels, and a VAE whose latents are normed by channel."""
    folder = make_folder("stable-diffusion-xl-base-1.0", tmp_path / "xl")
    diffusers.EDMDPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", NAME])
    edit_json(folder / "vae/config.json", latents_mean=[0.1, -1.0, 0.5, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    pipes = both(folder)
    compare(pipes, prompt=PROMPT, height=64, width=48, num_inference_steps=4)
    pipes[0].save_pretrained(tmp_path / "saved")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved").scheduler).__name__ == NAME
