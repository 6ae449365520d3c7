"""Saves that are cut off: by SIGKILL at any moment, by a full disk, by an error. The folder is whole afterwards.

Root may write anywhere, so what depends on permissions runs in a child that gives them up; mounts are made in a child
with a mount table of its own.
"""

import os
import random
import resource
import shutil
import signal
import time
import traceback

import pytest
import torch

import minidiff as m

KILLS = int(os.environ.get("MINIDIFF_KILLS", "40"))
FOREIGN = {"README.md": "mine", ".git/HEAD": "ref", "unet/notes.txt": "mine too", "figures/a/b.png": "png"}


def contents(folder):
    """Which of the two pipelines a folder holds: the value that every one of its weights has."""
    pipe = m.StableDiffusionPipeline.from_pretrained(folder)
    models = (pipe.unet, pipe.vae, pipe.text_encoder)
    values = {value.item() for model in models for parameter in model.parameters() for value in parameter.unique()}
    values.add(float(pipe.scheduler.config.beta_end))
    assert len(values) == 1, f"a mixture of {values}"
    return values.pop()


def filled(folder, value):
    """The pipeline in `folder` with one value everywhere: in its weights and in its scheduler's config."""
    pipe = m.StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in model.parameters():
                parameter.fill_(value)
    pipe.scheduler = m.PNDMScheduler.from_config(pipe.scheduler.config, beta_end=value)
    return pipe


OLD, NEW = 0.5, 0.25  # which float32 has exactly


@pytest.fixture
def folder(tiny_sd_folder, tmp_path):
    """The old pipeline, with files among its own that aren't the pipeline's."""
    filled(tiny_sd_folder, OLD).save_pretrained(tmp_path / "sd")
    for name, text in FOREIGN.items():
        (tmp_path / "sd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sd" / name).write_text(text)
    return tmp_path / "sd"


def check_foreign_files(folder):
    for name, text in FOREIGN.items():
        assert (folder / name).read_text() == text


def leftovers(folder):
    return [str(file) for file in folder.rglob("*") if file.name.startswith(".minidiff")]


def in_child(action):
    """Runs `action` in a fork, which ends with 0, or with 1 and a trace. Returns its process id."""
    if (child := os.fork()) == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_while_saving(folder, pipe, wait):
    """Saves in a fork, which is killed after `wait` seconds. Whether it died in the save rather than after it."""
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write_end, b"s")
            pipe.save_pretrained(folder)
        finally:
            os._exit(0)
    os.close(write_end)
    os.read(read_end, 1)
    os.close(read_end)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def whole_save(folder, pipe):
    """How many seconds a save takes in a fork that nobody kills."""
    start = time.perf_counter()
    if (child := os.fork()) == 0:
        pipe.save_pretrained(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return time.perf_counter() - start


@pytest.mark.parametrize("savers", (1, 2))
def test_killed_saves(folder, tiny_sd_folder, savers):
    """SIGKILL at random moments: the folder holds the old pipeline or the new one, from_pretrained finds it, foreign
    files stay, and the next save works. Old and new then swap places. A second saver writes the old one meanwhile."""
    pipes = {value: filled(tiny_sd_folder, value) for value in (OLD, NEW)}
    longest = whole_save(folder, pipes[OLD])
    choose, before, died, ends = random.Random(0), OLD, 0, {"old": 0, "new": 0}
    for _ in range(KILLS):
        after = NEW if before == OLD else OLD
        second = in_child(lambda: pipes[before].save_pretrained(folder)) if savers == 2 else None  # noqa: B023
        died += kill_while_saving(folder, pipes[after], choose.uniform(0, 1.3 * savers * longest))
        found = contents(folder)
        if second is not None:
            assert found in (before, after)
            assert exit_code(second) == 0
            found = contents(folder)
        assert found in (before, after)
        check_foreign_files(folder)
        ends["old" if found == before else "new"] += 1
        before = found
    pipes[NEW].save_pretrained(folder)
    assert contents(folder) == NEW
    assert sorted(os.listdir(folder.parent)) == ["sd"] and not leftovers(folder)
    print(
        f"{KILLS} kills, {died} within the save: {ends['old']} times the old pipeline is whole, {ends['new']} the new"
    )
    assert died > 0


def test_saves_that_end_at_every_call_to_the_system(folder, tiny_sd_folder, tmp_path):
    """The process ends before the first, the second, ... of the calls that change a folder: forks of one process."""
    filled(tiny_sd_folder, NEW).save_pretrained(tmp_path / "new")
    pipe, moments = m.StableDiffusionPipeline.from_pretrained(tmp_path / "new"), 0
    ends = set()
    while True:
        moments += 1
        copy = shutil.copytree(folder, tmp_path / "copies" / str(moments) / "sd")
        if (child := os.fork()) == 0:
            end_before_call(moments)
            pipe.save_pretrained(copy)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = contents(copy)
        assert found in (OLD, NEW)
        check_foreign_files(copy)
        ends.add(found)
        shutil.rmtree(copy.parent)
        if status == 0:
            break
        assert status == 9
    assert found == NEW
    assert ends == {OLD, NEW}
    print(f"{moments - 1} moments of a save at which its process ended")


def end_before_call(number):
    """Makes this process exit before the `number`th of the calls that change a folder."""
    calls = 0

    def counting(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapper

    for name in ("replace", "rename", "mkdir", "open", "unlink", "rmdir", "chmod"):
        setattr(os, name, counting(getattr(os, name)))


@pytest.mark.parametrize("limit", (0, 100, 5_000, 20_000, 50_000))
def test_full_disk(folder, tiny_sd_folder, limit):
    """No file may grow over `limit` bytes, as if the disk were full there: an OSError, and the old pipeline."""
    pipe = filled(tiny_sd_folder, NEW)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails instead of killing the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            pipe.save_pretrained(folder)
        except OSError:
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert contents(folder) == OLD
    check_foreign_files(folder)
    assert os.listdir(folder.parent) == ["sd"] and not leftovers(folder)


def test_foreign_files_survive_a_save(folder, tiny_sd_folder):
    filled(tiny_sd_folder, NEW).save_pretrained(folder)
    assert contents(folder) == NEW
    check_foreign_files(folder)


def test_a_part_that_cannot_be_saved(folder, tiny_sd_folder):
    pipe = filled(tiny_sd_folder, NEW)
    pipe.scheduler = object()
    with pytest.raises(TypeError, match="scheduler is a object"):
        pipe.save_pretrained(folder)
    assert contents(folder) == OLD


def test_a_file_in_the_way(tiny_sd_folder, tmp_path):
    (tmp_path / "sd").write_text("mine")
    with pytest.raises(m.LoadError, match="in the way"):
        filled(tiny_sd_folder, NEW).save_pretrained(tmp_path / "sd")
    assert (tmp_path / "sd").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path, tiny_sd_folder):
    """A parent that is a file. (Permissions mean nothing to root.)"""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        filled(tiny_sd_folder, NEW).save_pretrained(tmp_path / "file" / "sd")


@pytest.mark.parametrize("folder", (None, 3, b"sd"))
def test_folders_of_a_wrong_type(tiny_ddpm_folder, folder):
    pipe = m.DDPMPipeline.from_pretrained(tiny_ddpm_folder)
    with pytest.raises(TypeError, match="save_directory"):
        pipe.save_pretrained(folder)
    with pytest.raises(m.LoadError, match=r"save_directory.*null character"):
        pipe.save_pretrained("s\0d")


def test_interrupted_save(folder, tiny_sd_folder, monkeypatch):
    """Ctrl-C in the middle, in the same process."""
    pipe = filled(tiny_sd_folder, NEW)
    monkeypatch.setattr(m.CLIPTokenizer, "write_to", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(folder)
    assert contents(folder) == OLD
    assert os.listdir(folder.parent) == ["sd"] and not leftovers(folder)


def test_a_journal_that_is_half_written_counts_for_nothing(folder, tiny_sd_folder):
    """The process died while it wrote the journal, which no rename has put down: the old pipeline is there."""
    stage = folder / ".minidiff.saving"
    stage.mkdir()
    for half in ("", '{"": ['):
        (stage / ".minidiff.saved").write_text(half)
        assert contents(folder) == OLD
        m.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    filled(tiny_sd_folder, NEW).save_pretrained(folder)
    assert contents(folder) == NEW and not leftovers(folder)
