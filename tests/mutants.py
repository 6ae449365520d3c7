"""Do the property tests notice? Each mutant is the project with one token changed; one of them must fail.

    python tests/mutants.py            all mutants, two at a time; exit status 1 if one survives

Not part of the test run: it takes some minutes. Each mutant is imported in a fork of a process that has torch and the
reference in memory already, from a copy of the sources in a temporary folder.
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sampler_files(*names):
    return tuple(f"minidiff/schedulers/{name}.py" for name in names)


OLDEST = BASE, SCHEDULE, DDIM, DDPM, PNDM = sampler_files("base", "schedule", "ddim", "ddpm", "pndm")
VE = SIGMA, EULER, ANCESTRAL, HEUN, LMS, KDPM2, KDPM2_ANCESTRAL = sampler_files(
    "sigma", "euler", "euler_ancestral", "heun", "lms", "kdpm2", "kdpm2_ancestral"
)
SOLVERS = SOLVER, DPM, MULTISTEP, SINGLESTEP, UNIPC, DEIS = sampler_files(
    "solver", "dpm_solver", "dpm_solver_multistep", "dpm_solver_singlestep", "unipc", "deis"
)
OTHERS = DISTILLED, LCM, TCD, INVERSE, REPAINT, KARRAS_VE, SDE_VE, FLOW = sampler_files(
    "distilled", "lcm", "tcd", "ddim_inverse", "repaint", "karras_ve", "score_sde_ve", "flow_match_euler"
)
TABLES = RULES, UNET, VAE, CLIP = tuple(f"weights_compat/{name}.py" for name in ("rules", "unet", "vae", "clip"))

# The test files that have to notice, by what is mutated
TESTS = {
    **dict.fromkeys(
        OLDEST, tuple(f"tests/test_{name}.py" for name in ("properties_schedulers", "other_samplers", "schedulers"))
    ),
    **dict.fromkeys(VE, ("tests/test_sigma_samplers.py",)),
    **dict.fromkeys(SOLVERS, ("tests/test_solvers.py",)),
    **dict.fromkeys(OTHERS, ("tests/test_other_samplers.py",)),
    **dict.fromkeys(TABLES, ("tests/test_properties_tables.py",)),
}

# File, the code, and what it becomes. The code must stand there once.
MUTANTS = [
    # signs
    (BASE, "self.alphas = 1.0 - self.betas", "self.alphas = 1.0 + self.betas"),
    (BASE, "alpha * original_samples + sigma", "alpha * original_samples - sigma"),
    (BASE, "alpha * noise - sigma * sample", "alpha * noise + sigma * sample"),
    (BASE, "(sample - sigma * predicted) / alpha", "(sample + sigma * predicted) / alpha"),
    (BASE, "(sample - alpha * predicted) / sigma", "(sample + alpha * predicted) / sigma"),
    (BASE, "alpha * sample - sigma * predicted, alpha", "alpha * sample + sigma * predicted, alpha"),
    (BASE, "alpha * predicted + sigma * sample", "alpha * predicted - sigma * sample"),
    (BASE, "clamp(-c.clip_sample_range", "clamp(c.clip_sample_range"),
    (BASE, "(1 - alpha_bar) ** 0.5\n        if self", "(1 + alpha_bar) ** 0.5\n        if self"),
    (DDIM, "1 - alpha_bar_prev - sigma**2", "1 - alpha_bar_prev + sigma**2"),
    (DDIM, "* x0 + remaining**0.5", "* x0 - remaining**0.5"),
    (DDIM, "(1 - alpha_bar / alpha_bar_prev)", "(1 + alpha_bar / alpha_bar_prev)"),
    (DDIM, "self._alpha_bar(t - stride)", "self._alpha_bar(t + stride)"),
    (DDPM, "x0_weight * x0 + sample_weight", "x0_weight * x0 - sample_weight"),
    (DDPM, "beta = 1 - alpha\n", "beta = 1 + alpha\n"),
    (DDPM, "(predicted_variance + 1)", "(predicted_variance - 1)"),
    (PNDM, "(3, -1)", "(3, 1)"),
    (PNDM, "sample - (alpha_bar_prev - alpha_bar)", "sample + (alpha_bar_prev - alpha_bar)"),
    (PNDM, "(model_output + self.history[-1])", "(model_output - self.history[-1])"),
    # indices and neighbours
    (BASE, "np.arange(T, 0, -T / n).round() - 1", "np.arange(T, 0, -T / n).round() - 2"),
    (BASE, "* (T // (n + spare))", "* (T // (n + spare) + 1)"),
    (BASE, "np.linspace(0, T - 1, n", "np.linspace(0, T - 2, n"),
    (BASE, "if t >= 0 else self.final", "if t > 0 else self.final"),
    (SCHEDULE, "sqrt_alpha_bar[-1].clone()", "sqrt_alpha_bar[-2].clone()"),
    (SCHEDULE, "alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:] / alpha_bar[1:]"),
    (SCHEDULE, "range(T + 1)", "range(1, T + 2)"),
    (BASE, "True) else self.alphas_cumprod[0]", "True) else self.alphas_cumprod[1]"),
    (BASE, "else torch.tensor(-1)", "else torch.tensor(0)"),
    (DDPM, "if t > 0:", "if t > 1:"),
    (DDPM, "if t > 0:", "if t >= 0:"),
    (PNDM, "grid[:1], grid[1:2], grid[1:]", "grid[:1], grid[1:2], grid[2:]"),
    (PNDM, "self.history[-3:]", "self.history[-2:]"),
    (PNDM, "stage in (0, 2)", "stage in (0, 1)"),
    (PNDM, "grid[3:]", "grid[2:]"),
    (PNDM, "t + stride, t, return_dict", "t, t, return_dict"),
    # factors and exponents
    (SCHEDULE, "(t + 0.008) / 1.008", "(t + 0.008) / 1.004"),
    (
        SCHEDULE,
        "start**0.5, end**0.5, T, dtype=torch.float32) ** 2",
        "start**0.5, end**0.5, T, dtype=torch.float32) ** 1",
    ),
    (SCHEDULE, "dtype=torch.float32).sigmoid() * (end - start)", "dtype=torch.float32).sigmoid() * (end + start)"),
    (BASE, "limit.clamp(min=1,", "limit.clamp(min=2,"),
    (DDIM, "eta * variance**0.5", "eta * variance"),
    (DDPM, "alpha**0.5 * (1 - alpha_bar_prev)", "alpha * (1 - alpha_bar_prev)"),
    (DDPM, "torch.exp(0.5 * beta_tilde.log())", "torch.exp(beta_tilde.log())"),
    (DDPM, "return predicted_variance**0.5", "return predicted_variance"),
    (PNDM, "(23, -16, 5), 12", "(23, -16, 6), 12"),
    (PNDM, "(55, -59, 37, -9), 24", "(55, -59, 37, -9), 25"),
    (PNDM, "(1 / 6, 1 / 3, 1 / 3, 1 / 6)", "(1 / 6, 1 / 3, 1 / 6, 1 / 3)"),
    # solvers
    (SOLVER, "sigma / sigma_s, alpha, -h", "sigma / sigma_s, alpha, h"),
    (SOLVER, "2 if left == 2 and short", "2 if left == 1 and short"),
    (SOLVER, "shift * levels / (1 +", "shift * levels / (2 +"),
    (SOLVER, "alpha * predicted + sigma * sample", "alpha * predicted - sigma * sample"),
    (DPM, "grown / z - 1, (grown", "grown / z + 1, (grown"),
    (MULTISTEP, "slope + r0 * bend", "slope - r0 * bend"),
    (MULTISTEP, "/ (r0 + r1)", "/ (r0 - r1)"),
    (MULTISTEP, "range(i + 1, i - order, -1)", "range(i, i - order - 1, -1)"),
    (MULTISTEP, "return 2 if self", "return 3 if self"),
    (DPM, "< self._point(start)[2]", "< self._point(n - 2)[2]"),
    (SINGLESTEP, "2 * (far - near)", "(far - near)"),
    (SINGLESTEP, "r[1] * near - r[0] * far", "r[0] * near - r[1] * far"),
    (SINGLESTEP, "return [m[0], far,", "return [m[0], near,"),
    (SINGLESTEP, "if order == 1:", "if i == 0:"),
    (SINGLESTEP, "return i + 1 - order", "return i"),
    (SINGLESTEP, "lower_order_final and whole", "lower_order_final"),
    (SINGLESTEP, "i % p + 1, known", "i % p + 1, p"),
    (SINGLESTEP, "i + 1 == len(self.timesteps) and", "i + 2 == len(self.timesteps) and"),
    (SINGLESTEP, "lower_order_final: bool = False", "lower_order_final: bool = True"),
    (DPM, "weights[1] = grown / 2", "weights[1] = grown"),
    (DPM, "/ z**2 + 0.5", "/ z**2 - 0.5"),
    (DPM, "scale, deviation = 2 * scale", "scale, deviation = 1 * scale"),
    (UNIPC, "factorial *= j + 1", "factorial *= j"),
    (UNIPC, "range(1, order)]", "range(0, order - 1)]"),
    (UNIPC, "levels[0] -= 1e-6", "levels[0] -= 2e-6"),
    (DEIS, "rho[k + 1 :] + rho[1:k]", "rho[1:k] + rho[k + 1 :]"),
    (DEIS, "t * (-c + log_t - 1)", "t * (-c + log_t + 1)"),
    # state that isn't cleared
    (
        PNDM,
        "        self.counter = 0  # of calls to step",
        "        self.counter = getattr(self, 'counter', 0)  # of calls",
    ),
    (BASE, "self.history: tuple[Tensor, ...] = ()", "self.history = getattr(self, 'history', ())"),
    # the other samplers, and what they brought to the base
    (BASE, "if self.alphas_cumprod[t] == 0", "if self.alphas_cumprod[t] == 1"),
    (BASE, 'and not c.own("thresholding")', 'or c.own("thresholding")'),
    (
        BASE,
        "levels_at(timesteps, torch.promote_types(sample.dtype, torch.float32))",
        "levels_at(timesteps, sample.dtype)",
    ),
    (BASE, "self.begin_index if self.step_index is None else self", "self.begin_index if True else self"),
    (LCM, "c_out * x0 + c_skip * sample", "c_out * x0 - c_skip * sample"),
    (LCM, "if i + 1 < len(self.grid) else t", "if i + 1 < len(self.grid) else 0"),
    (LCM, "c_skip = SIGMA_DATA**2", "c_skip = SIGMA_DATA"),
    (LCM, "i != self.num_inference_steps - 1", "i != len(self.grid) - 1"),
    (LCM, "(1 - alpha_bar_next) ** 0.5 * noise", "(1 - alpha_bar) ** 0.5 * noise"),
    (DISTILLED, "* (len(self) // original) - 1", "* (len(self) // original)"),
    (DISTILLED, "endpoint=False", "endpoint=True"),
    (DISTILLED, "given[len(given) - int", "given[len(given) - 1 - int"),
    (DISTILLED, "always=self.unbounded and", "always=False and"),
    (TCD, "(1 - alpha_bar_s) ** 0.5 * eps", "(1 - alpha_bar) ** 0.5 * eps"),
    (TCD, "int((1 - eta) * t_next)", "int((1 - eta) * int(t_next))"),
    (TCD, "(1 - kept) ** 0.5", "(1 - kept**2) ** 0.5"),
    (TCD, "np.arange(int(len(self) * strength))", "np.arange(int(len(self) * strength)) + 1"),
    (INVERSE, "self._alpha_bar(t - stride), self._alpha_bar(t)", "self._alpha_bar(t), self._alpha_bar(t - stride)"),
    (INVERSE, "(1 - alpha_bar_next) ** 0.5 * eps", "(1 - alpha_bar) ** 0.5 * eps"),
    (INVERSE, "< 0 and self.final", "< 0 or self.final"),
    (REPAINT, "mask * known + (1.0 - mask) * painted", "(1.0 - mask) * known + mask * painted"),
    (REPAINT, '"jump_n_sample") - 1)', '"jump_n_sample"))'),
    (REPAINT, "range(0, n - jump, jump)", "range(0, n, jump)"),
    (REPAINT, "range(level + 1, level + jump + 1)", "range(level, level + jump)"),
    (REPAINT, "self.betas[t : t + stride]", "self.betas[t + 1 : t + stride + 1]"),
    (REPAINT, "beta**0.5 * noise", "beta * noise"),
    (KARRAS_VE, "self.config.sigma_min**2, self.config.sigma_max**2", "self.config.sigma_min, self.config.sigma_max"),
    (KARRAS_VE, "(sigma_hat**2 - sigma**2) ** 0.5", "(sigma_hat - sigma)"),
    (KARRAS_VE, "c.s_churn / n", "c.s_churn / (n + 1)"),
    (KARRAS_VE, "0.5 * derivative + 0.5 * corrected", "corrected"),
    (KARRAS_VE, "sample_prev + sigma_prev * model_output", "sample_prev - sigma_prev * model_output"),
    (SDE_VE, "levels[i + 1], levels[i]", "levels[i], levels[i + 1]"),
    (SDE_VE, "sample + diffusion**2 * model_output", "sample - diffusion**2 * model_output"),
    (SDE_VE, "score_norm) ** 2 * 2", "score_norm) ** 2"),
    (SDE_VE, "(2 * e) ** 0.5", "e**0.5"),
    (SDE_VE, "* (len(self.grid) - 1)).long()", "* len(self.grid)).long()"),
    (FLOW, "self.shift = c.shift", "self.shift = 1.0"),
    (FLOW, "np.linspace(self.sigma_max * T, self.sigma_min * T, n)", "np.linspace(T, 1, n)"),
    (FLOW, "(factor + (1 / t - 1)", "(factor + (1 / t + 1)"),
    (FLOW, "1 - run if c.invert_sigmas else run\n", "run\n"),
    (FLOW, "1 - distance / (", "1 - distance * ("),
    (FLOW, "sigma_next - sigma, model_output.dtype", "sigma - sigma_next, model_output.dtype"),
    (FLOW, "(levels < sigma - 1e-6)", "(levels <= sigma)"),
    (FLOW, "(1 - sigma_next) * (x", "(1 - sigma) * (x"),
    (FLOW, "add * noise + keep * sample", "keep * noise + add * sample"),
    # samplers in the noise level
    (EULER, "gamma + 1", "gamma - 1"),
    (EULER, "len(self.sigmas) - 1), 2**0.5", "len(self.sigmas)), 2**0.5"),
    (EULER, "(sigma_hat**2 - sigma**2) ** 0.5", "(sigma_hat**2 - sigma**2)"),
    (EULER, "(sigma_next - sigma_hat)", "(sigma_next - sigma)"),
    (EULER, "/ sigma_hat", "/ sigma"),
    (EULER, "0.25 * torch", "0.5 * torch"),
    (EULER, "s_tmin <= sigma <= s_tmax", "s_tmin <= sigma or sigma <= s_tmax"),
    (ANCESTRAL, "slope * (sigma_down - sigma)", "slope * (sigma_next - sigma)"),
    (ANCESTRAL, "noise * sigma_up", "noise * sigma_next"),
    (ANCESTRAL, "self.sigmas[i + 1]", "self.sigmas[i]"),
    (ANCESTRAL, "slope = (x - x0)", "slope = (x + x0)"),
    (SIGMA, "(sigma**2 - sigma_next**2) / sigma**2", "(sigma**2 - sigma_next**2) / sigma"),
    (SIGMA, "(sigma_next**2 - up**2).clamp", "(sigma_next**2 + up**2).clamp"),
    (SIGMA, ".clamp(min=0) ** 0.5", " ** 0.5"),
    (SIGMA, "[0, *np.repeat(np.arange(1,", "[0, *np.repeat(np.arange(0,"),
    (SIGMA, "if i % 2 and not self.history", "if i % 2 and self.history"),
    (SIGMA, "(1 - w) * i + w * (i + 1)", "(1 - w) * i + w * i"),
    (SIGMA, "(most**2 + 1) ** 0.5 if", "(most**2) ** 0.5 if"),
    (SIGMA, "least + _beta_quantiles(n)", "most + _beta_quantiles(n)"),
    (SIGMA, "rho: float = 7.0", "rho: float = 6.0"),
    (HEUN, "if i % 2 == 0", "if i % 2 == 1"),
    (HEUN, "(first + slope) / 2", "(first + slope) / 3"),
    (HEUN, "(first + slope) / 2", "(first - slope) / 2"),
    (HEUN, "self.sigmas[i - 1]", "self.sigmas[i + 1]"),
    (HEUN, "self.history = (sample, slope)", "self.history = (x0, slope)"),
    (HEUN, "self._bound(self._x0(model_output, sample, sigma))", "self._x0(model_output, sample, sigma)"),
    (LMS, "self.history[len(self.history) > order :]", "self.history[len(self.history) > 4 :]"),
    (LMS, "min(order, i + 1)", "min(order, len(self.history))"),
    (LMS, "min(order, i + 1)", "min(order, i)"),
    (LMS, "reversed(self.history)", "self.history"),
    (LMS, "1 / (powers + 1)", "1 / (powers + 2)"),
    (LMS, "- sigma) / h", "+ sigma) / h"),
    (LMS, "[sigma, *reversed(nodes)]", "[sigma, *nodes]"),
    (KDPM2, "levels[:-1].log(), 0.5)", "levels[:-1].log(), 0.4)"),
    (KDPM2, "np.float32", "np.float64"),
    (KDPM2, "self.middles[i // 2] if i % 2", "self.sigmas[i] if i % 2"),
    (KDPM2, "slope * (middle - sigma)", "slope * (end - sigma)"),
    (KDPM2, "slope * (end - sigma)", "slope * (middle - sigma)"),
    (KDPM2, "self.sigmas[i - i % 2]", "self.sigmas[i]"),
    (KDPM2, "rounded = True", "rounded = False"),
    (KDPM2_ANCESTRAL, "noise * self.ups", "noise * self.ends"),
    (KDPM2_ANCESTRAL, "if i % 2:", "if i % 2 == 0:"),
    (KDPM2_ANCESTRAL, "self.ends > 0, middles, levels[1:]", "self.ends > 0, middles, levels[:-1]"),
    (KDPM2_ANCESTRAL, "0.5).exp()", "0.6).exp()"),
    # names
    (RULES, "row._replace(hub=row.ours, ours=row.hub)", "row"),
    (RULES, "modern[0][0] if modern else name", "name"),
    (RULES, '(".weight", ".bias")', '(".weight",)'),
    (RULES, 'return [(f"{hub}.{a}", f"{ours}.{b}"', 'return [(f"{hub}.{a}", b'),
    (RULES, 'ends=("",)', 'ends=("", ".weight")'),
    (RULES, "([0-9]+)", "([0-9])"),
    (RULES, "pattern.fullmatch(name)", "pattern.match(name)"),
    (UNET, '("to_k", "k"), ("to_v", "v")', '("to_k", "v"), ("to_v", "k")'),
    (UNET, '("conv_shortcut", "skip")', '("conv_shortcut", "shortcut")'),
    (UNET, '("query", "to_q"), ("key", "to_k")', '("query", "to_k"), ("key", "to_q")'),
    (
        UNET,
        '"transformer_blocks.{}.norm2", "blocks.{}.cross_norm"',
        '"transformer_blocks.{}.norm2", "blocks.{}.ff_norm"',
    ),
    (UNET, 'ff.net.2"', 'ff.net.1"'),
    (UNET, '("linear_1", "fc1"), ("linear_2", "fc2")', '("linear_1", "fc2"), ("linear_2", "fc1")'),
    (UNET, '("up_blocks.{}", "up.{}")', '("up_blocks.{}", "down.{}")'),
    (UNET, 'upsamplers.0", "up', 'upsamplers.1", "up'),
    (VAE, '*half("decoder")', '*half("encoder")'),
    (VAE, "decoder.up.{}.resample.conv", "decoder.up.{}.resample"),
    (CLIP, '("layer_norm1", "norm1")', '("layer_norm1", "norm2")'),
    (CLIP, '("mlp.fc2", "fc2")', '("mlp.fc2", "fc1")'),
    (CLIP, '("embeddings.token_embedding", "token_embedding")', '("token_embedding", "token_embedding")'),
]


def copy_with(mutant, folder):
    for part in ("minidiff", "weights_compat", "tests", "pyproject.toml"):
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", "bundled")
        shutil.copytree(source, folder / part, ignore=ignore) if source.is_dir() else shutil.copy(source, folder)
    conftest = folder / "tests/conftest.py"  # no shrinking: any failure will do
    conftest.write_text(
        conftest.read_text().replace("set(Phase) - {Phase.explain}", "(Phase.explicit, Phase.generate)")
    )
    file, old, new = mutant
    code = (folder / file).read_text(encoding="utf-8")
    assert code.count(old) == 1, f"{file} has {old!r} {code.count(old)} times"
    (folder / file).write_text(code.replace(old, new), encoding="utf-8")


def survives(mutant, folder):
    """Runs the property tests of the mutated file in a fork, until one fails."""
    copy_with(mutant, folder)
    if (child := os.fork()) == 0:
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        out = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import pytest

        options = ["-x", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(folder)]
        os._exit(pytest.main([*options, *(str(folder / name) for name in TESTS[mutant[0]])]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(mutant):
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        status = survives(mutant, Path(folder))
        log = (Path(folder) / "log").read_text(errors="replace")
    by = next((line for line in log.splitlines() if line.startswith("FAILED")), log[-300:])
    verdict = {0: "SURVIVES", 1: "caught"}.get(status, f"status {status}")
    name = by.split("::")[-1].split(" ")[0] if status == 1 else by
    file, old, new = mutant
    print(f"{verdict:8} {time.monotonic() - start:5.1f} s  {file}: {old!r} -> {new!r}  {name}", flush=True)
    return status == 1


def main():
    import diffusers  # noqa: F401 (once, for all forks)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    assert "minidiff" not in sys.modules
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in str(mutant) for word in sys.argv[1:])]
    with ThreadPoolExecutor(2) as pool:
        caught = list(pool.map(run, chosen))
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    sys.exit(not all(caught))


if __name__ == "__main__":
    main()
