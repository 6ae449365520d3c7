"""One call of a pipeline: its own view of it, so that calls don't disturb one another."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

BUSY: dict[int, "Runs"] = {}  # by a scheduler's id, the run that it serves


class Runs:
    """What a call knows of itself, for `DiffusionPipeline`. The names are the reference's, and callbacks use them."""

    _guidance_scale: float = 0.0
    _guidance_rescale: float = 0.0
    _clip_skip: int | None = None
    _denoising_start: float | None = None
    _denoising_end: float | None = None
    _num_timesteps: int = 0
    _stopped: bool = False
    _is_run: bool = False  # whether this is a call's view, rather than the pipeline
    _whose: Self | None = None  # the pipeline of a view that `knowing` gives

    def knowing(self, **facts: Any) -> Self:
        """A view of the pipeline for a call that knows more than `__call__` takes: `facts` are its attributes. What
        `running` keeps of that call, it keeps with the pipeline."""
        view = copy.copy(self)
        vars(view).update(facts, _whose=self)
        return view

    @contextmanager
    def running(self, **settings: Any) -> Iterator[Self]:
        """A call's own view of the pipeline: the same components, but guidance, interruption and scheduler state of
        its own. So two threads may share a pipeline, a callback changes this run alone, and a run that fails leaves
        nothing behind. `settings` are kept as `_guidance_scale`, ...; the pipeline has them when the run is done.

        The pipeline's scheduler serves one run at a time, which it shows afterwards; any other has a twin of it.
        """
        run, scheduler, pipe = copy.copy(self), self.scheduler, self._whose or self
        run._stopped, run._is_run, run._whose = False, True, None
        vars(run).update({f"_{name}": value for name, value in settings.items()})
        if not pipe._runs:
            pipe._stopped = False
        mine = BUSY.setdefault(id(scheduler), run) is run
        run.scheduler = scheduler if mine else _twin(scheduler)
        BUSY[id(run.scheduler)] = run  # of a twin too: a run inside this one's callback takes a twin of that
        pipe._runs.append(run)
        try:
            yield run
        finally:
            pipe._runs.remove(run)
            del BUSY[id(run.scheduler)]
        if not self._is_run:  # else a run inside a callback, which changes nothing for the outer one
            vars(pipe).update({f"_{name}": getattr(run, f"_{name}") for name in (*settings, "num_timesteps")})

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles, which run nothing yet
        return vars(self) | {"_runs": []}

    @property
    def _interrupt(self) -> bool:
        """Set it, from a callback or another thread, and the run stops after the present step. On the pipeline itself
        it stops all its runs."""
        return self._stopped

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._stopped = bool(value)
        for run in self._runs:
            run._interrupt = value

    @property
    def interrupt(self) -> bool:
        return self._stopped

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def denoising_start(self) -> float | None:
        return self._denoising_start

    @property
    def denoising_end(self) -> float | None:
        return self._denoising_end

    @property
    def num_timesteps(self) -> int:
        """Of the present or the last run."""
        return self._num_timesteps

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1


def _twin(scheduler: Any) -> Any:
    """A copy with the same tables and a state of its own. Methods that somebody has wrapped stay with the original:
    they would step that one."""
    twin = copy.copy(scheduler)
    for name in [name for name in vars(twin) if callable(getattr(type(twin), name, None))]:
        delattr(twin, name)
    return twin
