"""Learning-rate schedules of training scripts: torch's LambdaLR, with a multiplier for each step."""

import math
from collections.abc import Callable
from enum import Enum

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .missing import getter

__all__ = [
    "SchedulerType",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_linear_schedule_with_warmup",
    "get_piecewise_constant_schedule",
    "get_polynomial_decay_schedule_with_warmup",
    "get_scheduler",
]
__getattr__ = getter(__name__, __all__)


class SchedulerType(Enum):
    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    PIECEWISE_CONSTANT = "piecewise_constant"


def warmed_up(warmup: int, steps: int, after: Callable[[float], float]) -> Callable[[int], float]:
    """From 0 to 1 in `warmup` steps, then `after` of the share of the rest that is done, which may exceed 1."""

    def multiplier(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return after((step - warmup) / max(1, steps - warmup))

    return multiplier


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """The optimizer's rate throughout. `last_epoch`, in all of them: torch's, to go on after a stop."""
    return LambdaLR(optimizer, lambda step: 1, last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """From 0 up to the optimizer's rate, and on at that."""
    return LambdaLR(optimizer, warmed_up(num_warmup_steps, 0, lambda done: 1.0), last_epoch)


def get_piecewise_constant_schedule(optimizer: Optimizer, step_rules: str, last_epoch: int = -1) -> LambdaLR:
    """`step_rules` "1:10,0.1:20,0.005": 1 times the rate before step 10, 0.1 times before step 20, then 0.005 times."""
    *rules, last = step_rules.split(",")
    try:
        ends = sorted((int(end), float(value)) for value, end in (rule.split(":") for rule in rules))
        last = float(last)
    except ValueError:
        raise ValueError(f"step_rules={step_rules!r} must read as in 1:10,0.1:20,0.005") from None

    def multiplier(step: int) -> float:
        return next((value for end, value in ends if step < end), last)

    return LambdaLR(optimizer, multiplier, last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    last_epoch: int = -1,
    f_min: float = 0.0,
    f_max: float = 1.0,
) -> LambdaLR:
    """From 0 up to `f_max` times the rate, then straight down, to `f_min` times it at the last step."""

    def multiplier(step: int) -> float:
        if step < num_warmup_steps:
            return f_max * step / max(1, num_warmup_steps)
        left = (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps)
        return f_min + (f_max - f_min) * max(0.0, left)

    return LambdaLR(optimizer, multiplier, last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """From 0 up to the rate, then down and up again along `num_cycles` waves of a cosine: half of one ends at 0."""

    def wave(done: float) -> float:
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * done)))

    return LambdaLR(optimizer, warmed_up(num_warmup_steps, num_training_steps, wave), last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    """From 0 up to the rate, then `num_cycles` times down along half a cosine, each from the rate on; 0 in the end."""

    def waves(done: float) -> float:
        return 0.0 if done >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * (num_cycles * done % 1.0))))

    return LambdaLR(optimizer, warmed_up(num_warmup_steps, num_training_steps, waves), last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """From 0 up to the rate, then down to `lr_end` by what is left of the steps to the `power`."""
    rate = optimizer.defaults["lr"]
    if not rate > lr_end:
        raise ValueError(f"lr_end={lr_end} must be smaller than the optimizer's lr={rate}")

    def multiplier(step: int) -> float:
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        if step > num_training_steps:
            return lr_end / rate
        left = 1 - (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return ((rate - lr_end) * left**power + lr_end) / rate

    return LambdaLR(optimizer, multiplier, last_epoch)


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    step_rules: str | None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """A schedule by its name, "cosine" for example. Each reads those of the other arguments that it knows.

    Raises ValueError for a name that isn't in `SchedulerType`, and for a missing argument.
    """
    try:
        kind = SchedulerType(name)
    except ValueError:
        supported = ", ".join(kind.value for kind in SchedulerType)
        raise ValueError(f"name={name!r} is no schedule; supported: {supported}") from None
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    make, arguments = {
        SchedulerType.CONSTANT: (get_constant_schedule, {}),
        SchedulerType.PIECEWISE_CONSTANT: (get_piecewise_constant_schedule, {"step_rules": step_rules}),
        SchedulerType.CONSTANT_WITH_WARMUP: (
            get_constant_schedule_with_warmup,
            {"num_warmup_steps": num_warmup_steps},
        ),
        SchedulerType.LINEAR: (get_linear_schedule_with_warmup, steps),
        SchedulerType.COSINE: (get_cosine_schedule_with_warmup, steps),
        SchedulerType.COSINE_WITH_RESTARTS: (
            get_cosine_with_hard_restarts_schedule_with_warmup,
            {**steps, "num_cycles": num_cycles},
        ),
        SchedulerType.POLYNOMIAL: (get_polynomial_decay_schedule_with_warmup, {**steps, "power": power}),
    }[kind]
    if missing := [argument for argument, value in arguments.items() if value is None]:
        raise ValueError(f"{', '.join(missing)} must be given for the schedule {kind.value!r}")
    return make(optimizer, last_epoch=last_epoch, **arguments)
