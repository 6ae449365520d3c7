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
SCHEDULERS, TABLES = "tests/test_properties_schedulers.py", "tests/test_properties_tables.py"
SOLVER, DPM, UNIPC, DEIS = (f"minidiff/schedulers/{name}.py" for name in ("solver", "dpm_solver", "unipc", "deis"))
BASE, DDIM, DDPM, PNDM = (f"minidiff/schedulers/{name}.py" for name in ("base", "ddim", "ddpm", "pndm"))
RULES, UNET, VAE, CLIP = (f"weights_compat/{name}.py" for name in ("rules", "unet", "vae", "clip"))

# File, the code, and what it becomes. The code must stand there once.
MUTANTS = [
    # signs
    (BASE, "self.alphas = 1.0 - self.betas", "self.alphas = 1.0 + self.betas"),
    (BASE, "* original_samples + sqrt_one", "* original_samples - sqrt_one"),
    (BASE, "* noise - sqrt_one_minus_alpha_bar * sample", "* noise + sqrt_one_minus_alpha_bar * sample"),
    (BASE, "(sample - sqrt_one_minus_alpha_bar * eps)", "(sample + sqrt_one_minus_alpha_bar * eps)"),
    (BASE, "(sample - sqrt_alpha_bar * x0)", "(sample + sqrt_alpha_bar * x0)"),
    (BASE, "sqrt_alpha_bar * sample - sqrt_one", "sqrt_alpha_bar * sample + sqrt_one"),
    (BASE, "sqrt_alpha_bar * model_output + sqrt_one", "sqrt_alpha_bar * model_output - sqrt_one"),
    (BASE, "clamp(-config.clip_sample_range", "clamp(config.clip_sample_range"),
    (BASE, "(1 - alpha_bar) ** 0.5\n        if self", "(1 + alpha_bar) ** 0.5\n        if self"),
    (DDIM, "1 - alpha_bar_prev - sigma**2", "1 - alpha_bar_prev + sigma**2"),
    (DDIM, "* x0 + direction_to_x_t", "* x0 - direction_to_x_t"),
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
    (BASE, "* (T // n) + offset", "* (T // n + 1) + offset"),
    (BASE, "np.linspace(0, T - 1, n)", "np.linspace(0, T - 2, n)"),
    (BASE, "if t >= 0 else self.final", "if t > 0 else self.final"),
    (BASE, "sqrt_alpha_bar[-1].clone()", "sqrt_alpha_bar[-2].clone()"),
    (BASE, "alpha_bar[1:] / alpha_bar[:-1]", "alpha_bar[1:] / alpha_bar[1:]"),
    (BASE, "range(num_train_timesteps + 1)", "range(1, num_train_timesteps + 2)"),
    (DDIM, "self.final_alpha_cumprod = self.alphas_cumprod[0]", "self.final_alpha_cumprod = self.alphas_cumprod[1]"),
    (DDPM, "[*grid[1:], -1]", "[*grid[1:], 0]"),
    (DDPM, "if t > 0:", "if t > 1:"),
    (DDPM, "if t > 0:", "if t >= 0:"),
    (PNDM, "self.final_alpha_cumprod = self.alphas_cumprod[0]", "self.final_alpha_cumprod = self.alphas_cumprod[1]"),
    (PNDM, "grid[:1], grid[1:2], grid[1:]", "grid[:1], grid[1:2], grid[2:]"),
    (PNDM, "self.history[-3:]", "self.history[-2:]"),
    (PNDM, "stage in (0, 2)", "stage in (0, 1)"),
    (PNDM, "grid[3:]", "grid[2:]"),
    (PNDM, "t + stride, t, return_dict", "t, t, return_dict"),
    # factors and exponents
    (BASE, "(t + 0.008) / 1.008", "(t + 0.008) / 1.004"),
    (BASE, "start**0.5, end**0.5, T, dtype=torch.float32) ** 2", "start**0.5, end**0.5, T, dtype=torch.float32) ** 1"),
    (BASE, "dtype=torch.float32).sigmoid() * (end - start)", "dtype=torch.float32).sigmoid() * (end + start)"),
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
    (DPM, "slope + r0 * bend", "slope - r0 * bend"),
    (DPM, "weights[1] = grown / 2", "weights[1] = grown"),
    (DPM, "/ z**2 + 0.5", "/ z**2 - 0.5"),
    (DPM, "scale, deviation = 2 * scale", "scale, deviation = 1 * scale"),
    (UNIPC, "factorial *= j + 1", "factorial *= j"),
    (UNIPC, "range(1, order)]", "range(0, order - 1)]"),
    (UNIPC, "levels[0] -= 1e-6", "levels[0] -= 2e-6"),
    (DEIS, "rho[k + 1 :] + rho[1:k]", "rho[1:k] + rho[k + 1 :]"),
    (DEIS, "t * (-c + log_t - 1)", "t * (-c + log_t + 1)"),
    # state that isn't cleared
    (PNDM, "        self.counter = 0  # of calls to step", "        self.counter = getattr(self, 'counter', 0)"),
    (PNDM, "self.history: list[torch.Tensor] = []", "self.history = getattr(self, 'history', [])"),
    # names
    (RULES, "(ours, hub) for hub, ours in rows", "(hub, ours) for hub, ours in rows"),
    (RULES, "self._modern(name) or name", "name"),
    (RULES, "([0-9]+)", "([0-9])"),
    (RULES, "pattern.fullmatch(module)", "pattern.match(module)"),
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
    (UNET, "upsamplers.0.conv", "upsamplers.1.conv"),
    (VAE, '*half("decoder")', '*half("encoder")'),
    (VAE, "decoder.up.{}.resample.conv", "decoder.up.{}.resample"),
    (CLIP, '("layer_norm1", "norm1")', '("layer_norm1", "norm2")'),
    (CLIP, '("mlp.fc2", "fc2")', '("mlp.fc2", "fc1")'),
    (CLIP, '("embeddings.position_embedding", "position_embedding")', '("position_embedding", "position_embedding")'),
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

        tests = TABLES if mutant[0].startswith("weights_compat") else SCHEDULERS
        tests = "tests/test_solvers.py" if mutant[0] in (SOLVER, DPM, UNIPC, DEIS) else tests
        options = ["-x", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(folder)]
        os._exit(pytest.main([*options, str(folder / tests)]))
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
