"""Saving: a folder that afterwards holds all of the new, or is as it was. Whatever else is in it stays as it is.

Files are renamed within their own directory and nothing else is moved, so a save works wherever one may write:

    unet/.minidiff.saving/config.json    1. new files are written to a place of their own, beside those they'll replace
    .minidiff.saved                      2. this journal is put down, in one rename: the new files count from here on
    unet/config.json                     3. they are renamed into place, what ends is removed, and the journal last

Whoever finds a journal, a reader or the next save, first does what is left of step 3. New files without a journal are
of a save that was cut off in step 1: the next save throws them away. Savers take turns, and wait in step 3 for whoever
reads just then. Locks are the system's (`flock`), which a process that dies lets go of; Windows has none, there one
must not save to a folder twice at once.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .config import LoadError, read_json, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INDEX, STAGE, JOURNAL = "model_index.json", ".minidiff.saving", ".minidiff.saved"

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)  # of a file system that hasn't them


@contextmanager
def replacing(folder: Path, ends: Mapping[str, Callable[[Path], set[str]]]) -> Iterator[dict[str, Path]]:
    """Empty places to write to, one for each part of `folder` ("" is the folder itself, "unet" is in it).

    When the block ends well, what was written takes its place in `folder`, and with it end the old files that
    `ends[part](folder / part)` names. If the block fails, or the process dies in it, `folder` is as it was.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and what it points to is replaced
    stages, journal = {part: folder / part / STAGE for part in ends}, {}
    with _turn(folder, stages) as made:
        try:
            yield stages
            for part, stage in stages.items():
                new = {file.name for file in stage.iterdir()}
                if blocked := [name for name in sorted(new) if (folder / part / name).is_dir()]:
                    raise LoadError(f"{folder / part / blocked[0]}: a folder of that name is in the way")
                journal[part] = sorted(ends[part](folder / part) - new)
            write_json(stages[""] / JOURNAL, journal)
        except BaseException:
            _empty(stages)
            for stage in stages.values():
                stage.rmdir()
            for place in reversed(made):
                with suppress(OSError):  # another save is about to use it
                    place.rmdir()
            raise
        with locked([folder]), locked(_places(folder, journal)):
            os.replace(stages[""] / JOURNAL, folder / JOURNAL)
            _put_in_place(folder, journal)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keeps savers waiting before their last step meanwhile, and first does that of one that was cut off."""
    while folder.is_dir():
        with locked([folder], shared=True):
            index = read_json(folder / INDEX) if os.path.lexists(folder / INDEX) else {}
            with locked(_places(folder, filter(is_plain, index)), shared=True):
                if not (left := _journals(folder)):
                    yield
                    return
        for place in left:
            _finish(place)
    yield  # there is nothing to wait for, and who reads says so


def is_plain(name: object) -> bool:
    """Whether `name` is that of something beside the file that says so: what folders say is not to be trusted."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {"/", "\\", "\0"}


def _journals(folder: Path) -> list[Path]:
    """Where a save that wrote to `folder`, or to a part of it, was cut off in its last step."""
    # One that lies in a stage isn't put down yet, and may be half written
    parts = [file.parent for file in folder.glob(f"*/{JOURNAL}") if file.parent.name != STAGE]
    above = [folder.absolute().parent] if os.path.lexists(folder / STAGE) else []  # else it is done with this part
    return [place for place in (*above, folder, *parts) if os.path.lexists(place / JOURNAL)]


@contextmanager
def _turn(folder: Path, stages: Mapping[str, Path]) -> Iterator[list[Path]]:
    """Waits until nobody else saves here, and makes the empty `stages`. Yields the folders that it made for them."""
    places = [stage.parent for stage in stages.values()]
    taken = None
    while taken is None:
        for place in _journals(folder):
            _finish(place)
        if denied := [place for place in places if place.exists() and not os.access(place, os.W_OK)]:
            raise PermissionError(errno.EACCES, "Permission denied", str(denied[0]))
        made = [place for place in places if not place.exists()]
        for place in places:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise LoadError(f"{place}: a file of that name is in the way") from None
        if len({os.path.realpath(place) for place in places}) < len(places):
            raise LoadError(f"{folder}: two of its parts are links to one folder")
        taken = _take_turn(folder, stages)
    with taken:
        _empty(stages)
        yield made


def _take_turn(folder: Path, stages: Mapping[str, Path]) -> ExitStack | None:
    """Locks all of `stages`; None if another save, which has ended while this one waited, took one of them away."""
    with ExitStack() as stack, suppress(FileNotFoundError):
        for stage in stages.values():
            stage.mkdir(exist_ok=True)
        held = stack.enter_context(locked(stages.values()))
        # In this order: the last step of a save ends its stages before its journal
        if not _journals(folder) and all(os.path.samestat(os.fstat(fd), os.stat(at)) for at, fd in held.items()):
            return stack.pop_all()
    return None


def _empty(stages: Mapping[str, Path]) -> None:
    for file in (file for stage in stages.values() if stage.exists() for file in stage.iterdir()):
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _finish(folder: Path) -> None:
    """The last step of a save that was cut off, unless somebody else has done it meanwhile."""
    with locked([folder]):
        if not os.path.lexists(folder / JOURNAL):
            return
        journal = read_json(folder / JOURNAL)
        for part, ends in journal.items():
            if not (part == "" or is_plain(part)) or not isinstance(ends, list) or not all(map(is_plain, ends)):
                raise LoadError(f"{folder / JOURNAL}: {part!r}: {ends!r} isn't what a save writes there")
        with locked(_places(folder, journal)):
            _put_in_place(folder, journal)


def _put_in_place(folder: Path, journal: Mapping[str, list[str]]) -> None:
    try:
        for part, ends in journal.items():
            place, stage = folder / part, folder / part / STAGE
            if not stage.is_dir() or stage.is_symlink():  # this part is done. (So no file of elsewhere is touched.)
                continue
            for name in ends:
                (place / name).unlink(missing_ok=True)
            for file in sorted(stage.iterdir()):
                os.replace(file, place / file.name)
            stage.rmdir()
        (folder / JOURNAL).unlink()
    except OSError as error:
        raise LoadError(
            f"{folder}: a save is complete, but its last step, renaming, can't be done: {error}. The next load or save"
            " tries again. It may need permission to write there; on Windows, the end of models loaded from there"
        ) from error


def _places(folder: Path, parts: Iterable[str]) -> set[str]:
    """To lock after the folder itself: in this order everywhere, so that nobody waits in a circle."""
    inside = {os.path.realpath(folder / part) for part in parts if (folder / part).is_dir()}
    return inside - {os.path.realpath(folder)}


@contextmanager
def locked(places: Iterable[str | Path], shared: bool = False, wait: bool = True) -> Iterator[dict[str, int]]:
    """Waits for the system's locks of files or folders and holds them: one alone, or with others who share them.

    Raises BlockingIOError where it may not `wait` and somebody else has one.
    """
    with ExitStack() as stack:
        held: dict[str, int] = {}
        for place in sorted(map(os.path.realpath, places)) if fcntl else ():
            try:
                held[place] = os.open(place, os.O_RDONLY)
            except PermissionError:
                raise LoadError(f"{place}: permission denied") from None
            stack.callback(os.close, held[place])
            try:
                fcntl.flock(held[place], (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
        yield held
