"""How time grows: with the pixels of a picture, with the pictures drawn at once, with the steps. `bench --sweep`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .sides import Inputs
from .stages import call_arguments, conditions

Points = list[tuple[float, float]]  # how much, and seconds
SIDES = (0.5, 0.75, 1, 1.5, 2)  # of the picture that the UNet was trained with
COUNTS = (1, 2, 4, 8)


def sweep(pipe: Any, inputs: Inputs, seconds: Callable[[Callable[[], Any]], float]) -> dict[str, Points]:
    """Passes of the UNet over more and more pixels, and over more and more pictures; and calls of more steps."""
    c = pipe.unet.config
    side = c.sample_size[0] if isinstance(c.sample_size, tuple) else c.sample_size or 64
    multiple = 2 ** (len(c.block_out_channels) - 1)

    def one(B: int, length: int) -> float:
        x, t = inputs.randn(B, c.in_channels, length, length), torch.full((B,), 500, device=inputs.device)
        return seconds(lambda: pipe.unet(x, t, **conditions(c, inputs, B)))

    def call(steps: int) -> float:
        options = call_arguments(pipe, inputs._replace(steps=steps))
        return seconds(lambda: pipe(**options | ({"output_type": "latent"} if hasattr(pipe, "vae") else {})))

    lengths = [max(1, round(side * factor / multiple)) * multiple for factor in SIDES]
    with torch.no_grad():
        one(1, lengths[0])  # chooses kernels and fills caches
        return {
            "pixels of latents (pass of 1)": [(length**2, one(1, length)) for length in lengths],
            "pictures at once (pass)": [(B, one(B, side)) for B in COUNTS],
            "steps (whole call)": [(steps, call(steps)) for steps in COUNTS],
        }


def exponent(points: Points) -> float:
    """The p of seconds ~ x^p that fits best."""
    x, y = np.log(points).T
    return np.polyfit(x, y, 1)[0].item()


def draw_powers(rows: dict[str, Points], file: Path) -> None:
    """The points and the fitted powers, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(rows), 3.4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        (x, y), p = zip(*points, strict=True), exponent(points)
        middle = math.exp(np.log(y).mean() - p * np.log(x).mean())
        axes.loglog(x, y, "o")
        axes.loglog(x, [middle * one**p for one in x], color="grey")
        axes.set(title=f"power {p:.2f}", xlabel=name, ylabel="seconds")
        axes.minorticks_off()
        axes.set_xticks(x, [f"{one:g}" for one in x])
        axes.set_yticks(y, [f"{one:.3g}" for one in y])
    figure.savefig(file, dpi=110)
