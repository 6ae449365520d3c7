"""THE loop: from noise to a sample, one step of a scheduler at a time. Every system runs it.

Systems differ in four seams, which are functions: where the loop **starts** (the latents and timesteps that it is
given), what lies **beside** the latents in the network's input, what the network is **told**, and what is done
**after** a step. `tensors` holds everything by name that a step reads: "latents", "prompt_embeds", ...
"""

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import as_integer, check_number, check_tensors

if TYPE_CHECKING:
    from .base import DiffusionPipeline

Tensors = dict[str, Tensor]


def denoise(
    run: "DiffusionPipeline",
    tensors: Tensors,
    timesteps: Tensor,
    *,
    told: Callable[[Tensors, Tensor, Tensor], dict[str, Any]] = lambda tensors, x, t: {},
    beside: Callable[[Tensors], list[Tensor]] | None = None,
    after: Callable[[int, Tensor], Tensor] = lambda i, latents: latents,
    passes: int = 2,
    combine: Callable[..., Tensor] | None = None,
    callback: "Callback | None" = None,
    **step_options: Any,
) -> Tensor:
    """Takes `tensors["latents"]` (B, C, H, W) through `timesteps`, and returns the last ones.

    `run` is this call's own view of the pipeline (`DiffusionPipeline.running`); a callback may change its guidance
    from step to step. With guidance the network sees the batch twice, without the prompt and with it; or `passes`
    times, and `combine(run, *predictions)` makes one prediction of them.
    """
    scheduler, device = run.scheduler, tensors["latents"].device
    options = accepted(type(scheduler).step, step_options)
    if step_options.get("eta") and "eta" not in options:
        warnings.warn(f"eta has no effect: {type(scheduler).__name__} doesn't read it", stacklevel=3)
    combine = combine or (lambda run, uncond, text: guide(uncond, text, run.guidance_scale, run.guidance_rescale))
    run._num_timesteps, finite = len(timesteps), []
    times = timesteps.to(device, torch.float32)  # of one type for the network, whatever the sampler: compiled once
    for i, (t, t_on_device) in enumerate(zip(run.progress_bar(timesteps), times, strict=True)):
        if run.interrupt:
            break
        latents, guided = tensors["latents"], run.do_classifier_free_guidance
        x = torch.cat([latents] * passes) if guided else latents
        x = scheduler.scale_model_input(x, t)
        if beside is not None:
            x = torch.cat([x, *beside(tensors)], dim=1)
        predicted = run.unet(x, t_on_device, **told(tensors, x, t_on_device)).sample
        if guided:
            predicted = combine(run, *predicted.chunk(passes))
        stepped = scheduler.step(predicted, t, latents, **options)
        tensors["latents"] = after(i, stepped[0])
        if "denoised" in tensors:  # latent consistency models: where the path ends, as far as is seen from here
            tensors["denoised"] = stepped.denoised
        if callback is not None:
            callback(run, i, t, tensors, passes)
        finite.append(tensors["latents"].isfinite().all())
    check_finite(finite, timesteps)
    return tensors["latents"]


def guide(uncond: Tensor, text: Tensor, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6, with its w + 1 as `guidance_scale`): away from the
    prediction without the text. `guidance_rescale` takes back the contrast that it adds (arXiv 2305.08891, eq. 15-16).
    """
    predicted = uncond + guidance_scale * (text - uncond)
    if guidance_rescale > 0:
        dims = tuple(range(1, predicted.ndim))
        spread = predicted.std(dims, keepdim=True)
        spread = torch.where(spread == 0, 1, spread)  # a constant prediction has no contrast to take back
        rescaled = predicted * (text.std(dims, keepdim=True) / spread)
        predicted = guidance_rescale * rescaled + (1 - guidance_rescale) * predicted
    return predicted


def plan(
    scheduler: Any,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    **options: Any,
) -> Tensor:
    """Lays the scheduler's grid: a number of steps, or custom `timesteps` or `sigmas` where it takes them. `options`
    are the scheduler's own."""
    if reason := getattr(scheduler, "own_loop", ""):
        raise ValueError(f"scheduler is {type(scheduler).__name__}, which {reason}: this pipeline's loop can't run it")
    given = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {name: value for name, value in given.items() if value is not None}
    if len(custom) > 1:
        raise ValueError("timesteps and sigmas exclude each other: give one")
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name} was given, which {type(scheduler).__name__} doesn't take")
    scheduler.set_timesteps(**custom or {"num_inference_steps": num_inference_steps}, **options)
    return scheduler.timesteps


def start_midway(scheduler: Any, timesteps: Tensor, strength: float, at_least: int = 0) -> Tensor:
    """The last part of the grid that `plan` has laid: `strength` (0 to 1) of its steps, rounded down.

    Raises ValueError where no step is left, or fewer than `at_least` of the steps asked for: PNDM's grid has one more.
    """
    check_number(strength, "strength", least=0)
    if strength > 1:
        raise ValueError(f"strength={strength} must lie in 0..1")
    n = scheduler.num_inference_steps or len(timesteps)  # samplers count custom timesteps in the grid alone
    left = min(int(n * strength), n)
    first = (n - left) * scheduler.order
    if first >= len(timesteps) or left < at_least:
        raise ValueError(f"strength={strength} leaves none of {n} steps: take a larger one")
    scheduler.set_begin_index(first)
    return timesteps[first:]


def share(name: str, value: float | None) -> float | None:
    """A point of the run as a share of the noise that is gone, between 0 and 1."""
    if value is not None:
        check_number(value, name)
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1")
    return value


def start_at(scheduler: Any, timesteps: Tensor, denoising_start: float) -> Tensor:
    """The last part of the grid: where the share `denoising_start` of the training's timesteps is done already.

    Another network may have done it (eDiff-I, arXiv 2211.01324: an ensemble of experts).
    """
    left = int((timesteps < _cutoff(scheduler, denoising_start)).sum())
    if scheduler.order == 2 and left % 2 == 0:  # a step's second stage isn't a start
        left += 1
    if not left or left > len(timesteps):
        raise ValueError(f"denoising_start={denoising_start} leaves none of {len(timesteps)} steps")
    scheduler.set_begin_index(len(timesteps) - left)
    return timesteps[len(timesteps) - left :]


def stop_at(scheduler: Any, timesteps: Tensor, denoising_end: float | None) -> Tensor:
    """The first part of the grid: until the share `denoising_end` of the training's timesteps is done."""
    if denoising_end is None or denoising_end == 1:
        return timesteps
    kept = timesteps[: int((timesteps >= _cutoff(scheduler, denoising_end)).sum())]
    if not len(kept):
        raise ValueError(f"denoising_end={denoising_end} leaves none of {len(timesteps)} steps")
    return kept


def _cutoff(scheduler: Any, done: float) -> int:
    count = scheduler.config.num_train_timesteps
    return round(count - done * count)


def accepted(step: Callable, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that a scheduler's `step` takes: DDIM's has eta and generator, DDPM's a generator, ..."""
    parameters = inspect.signature(step).parameters
    return {name: value for name, value in options.items() if name in parameters}


class Callback:
    """A call's `callback_on_step_end`: what it may see, and what of its answer is taken over.

    Args:
        function: called as f(pipe, i, t, tensors) after each step; `pipe` is this run's view, `t` a tensor of one
            number. Its own `tensor_inputs`, if it has any, stand in place of `named`.
        named: the tensors that it is given, out of `known`. It may return any of the known ones.
        legacy: the reference's older `callback`, called as f(i, t, latents) every `every` steps.
    """

    def __init__(
        self,
        function: Callable | None,
        named: Sequence[str],
        known: Collection[str],
        legacy: Callable | None = None,
        every: int | None = None,
    ):
        for name, value in (("callback_on_step_end", function), ("callback", legacy)):
            if not (value is None or callable(value)):
                raise TypeError(f"{name} must be a function, not {value!r}")
        named = getattr(function, "tensor_inputs", None) or named
        if not isinstance(named, list | tuple) or not set(map(str, named)) <= set(known):
            raise ValueError(f"callback_on_step_end_tensor_inputs={named!r} must be a list of {', '.join(known)}")
        self.function, self.named, self.known, self.legacy = function, named, known, legacy
        self.every = as_integer(1 if every is None else every, "callback_steps")
        if self.every < 1:
            raise ValueError(f"callback_steps={every} must be 1 or more")

    def __call__(self, run: "DiffusionPipeline", i: int, t: Tensor, tensors: Tensors, passes: int = 2) -> None:
        if self.legacy is not None and i % self.every == 0:
            self.legacy(i, t, tensors["latents"])
        if self.function is None:
            return
        seen = {name: tensors.get(name) for name in self.named}
        changed = self.function(run, i, t, dict(seen))
        if not isinstance(changed, Mapping | None):
            raise TypeError(f"callback_on_step_end must return a dict or None, but returned {changed!r}")
        before, changed = tensors.get("negative_prompt_embeds"), changed or {}
        for name, value in changed.items():
            if name not in self.known:
                raise ValueError(f"callback_on_step_end returned {name!r}, which is none of {', '.join(self.known)}")
            if value is tensors.get(name):
                continue
            check_tensors(**{name: value})
            if name == "latents" and value.shape != tensors[name].shape:
                shapes = f"{tuple(value.shape)}, not {tuple(tensors[name].shape)}"
                raise ValueError(f"callback_on_step_end returned latents of shape {shapes}")
            tensors[name] = value
        negatives = tensors.get("negative_prompt_embeds")
        if negatives is not before and run.do_classifier_free_guidance:  # they are the first half of the states
            tensors["prompt_embeds"] = torch.cat([negatives, tensors["prompt_embeds"].chunk(2)[-1]])
        rows = tensors["latents"].shape[0] * (passes if run.do_classifier_free_guidance else 1)
        if "prompt_embeds" in tensors and tensors["prompt_embeds"].shape[0] != rows:
            raise ValueError(
                f"after callback_on_step_end, prompt_embeds has {tensors['prompt_embeds'].shape[0]} rows, but"
                f" guidance_scale={run.guidance_scale} needs {rows}: above 1 those without the prompt come first"
            )


def check_finite(finite: list[Tensor], timesteps: Tensor) -> None:
    """Raises FloatingPointError with the first step after which the sample wasn't finite. `finite` holds a bool for
    each step, where the sample is: they are read here, once, so that no step waits for the device."""
    flags = torch.stack(finite).tolist() if finite else []
    if False in flags:
        i = flags.index(False)
        raise FloatingPointError(
            f"the sample isn't finite after step {i + 1} of {len(timesteps)} (timestep {timesteps[i].item():g}): a"
            " weight or an argument is NaN or infinite, or the dtype overflows, which torch.bfloat16 and torch.float32"
            " seldom do"
        )
