"""Saves anywhere: the working directory, mounts, other people's folders, two savers at once; modes, links, networks
that aren't what their config makes. Root may do all, so permissions are tested in children that gave theirs up.
"""

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults_saves import FOREIGN, NEW, OLD, check_foreign_files, contents, exit_code, filled, in_child, leftovers
from test_faults_saves import folder as folder  # the fixture

import minidiff as m
from minidiff.loading import save

NOBODY = 65534
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def new(tiny_sd_folder):
    return filled(tiny_sd_folder, NEW)


@pytest.fixture
def open_place():
    """A folder that another user can get to, unlike pytest's."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        yield Path(place)


def as_nobody(action):
    """Runs `action` in a child without root's rights, and raises what it raises."""
    read_end, write_end = os.pipe()

    def run():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            action()
        except Exception as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())

    child = in_child(run)
    os.close(write_end)
    with open(read_end) as said:
        text = said.read()
    assert exit_code(child) == 0
    return text


def give(folder, owner=NOBODY):
    if os.geteuid() == 0:
        for file in (folder, *folder.rglob("*")):
            os.chown(file, owner, owner)


def mode(file):
    return stat.S_IMODE(os.stat(file).st_mode)


# Places


def test_the_working_directory_stays(folder, new, monkeypatch):
    monkeypatch.chdir(folder)
    before = os.stat(".").st_ino
    new.save_pretrained(".")
    assert os.stat(".").st_ino == os.stat(folder).st_ino == before
    assert contents(Path(".")) == contents(folder) == NEW
    check_foreign_files(folder)
    monkeypatch.chdir(folder / "unet")
    new.unet.save_pretrained(Path())
    assert contents(folder) == NEW and not leftovers(folder)


def mount(place):
    """A file system of its own at `place`, for this process; False where the machine doesn't allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
    return (
        sys.platform == "linux"
        and libc.unshare(new_mounts) == 0
        and libc.mount(b"none", b"/", None, private | recursive, None) == 0
        and libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, None) == 0
    )


def as_if_mounted(place, monkeypatch):
    """What a mount does to the calls that a save may make."""

    def refusing(function):
        def wrapper(source, target, *args, **kwargs):
            if os.path.realpath(place) in (os.path.realpath(source), os.path.realpath(target)):
                raise OSError(errno.EBUSY, "Device or resource busy", str(place))
            inside = [os.path.realpath(place) in map(str, Path(os.path.realpath(p)).parents) for p in (source, target)]
            if inside[0] != inside[1]:
                raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
            return function(source, target, *args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("how", ("mounted", "as if"))
@pytest.mark.parametrize("inside", ("", "unet", "figures"))
def test_mounts(folder, new, monkeypatch, inside, how):
    """The folder itself, a component's or a foreign folder in it is a mount: saved in place, foreign files too."""
    place = folder / inside

    def run():
        if how == "as if" or not mount(place):
            as_if_mounted(place, monkeypatch)
        else:
            (place / "on the mount").write_text("mine")
            for name, text in FOREIGN.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        new.save_pretrained(folder)
        assert contents(folder) == NEW
        check_foreign_files(folder)
        assert not os.path.ismount(place) or (place / "on the mount").read_text() == "mine"
        assert not leftovers(folder)

    assert exit_code(in_child(run)) == 0


def test_a_folder_in_a_parent_that_may_not_be_written(open_place, folder, new):
    place = shutil.copytree(folder, open_place / "locked" / "sd")
    give(place)
    os.chmod(place.parent, 0o555)
    assert as_nobody(lambda: new.save_pretrained(place)) == ""
    assert contents(place) == NEW
    check_foreign_files(place)


@pytest.mark.parametrize("part", ("", "unet"))
def test_a_folder_that_may_not_be_written_stays_as_it_was(open_place, folder, new, part):
    place = shutil.copytree(folder, open_place / "sd")
    give(place)
    os.chmod(place / part, 0o555)
    assert re.search(f"Permission denied.*{place / part}", as_nobody(lambda: new.save_pretrained(place)))
    assert contents(place) == OLD and not leftovers(place)


# Modes


@pytest.mark.parametrize("folder_mode", (0o700, 0o2775, 0o755))
def test_modes_of_folders_and_of_foreign_files_stay(folder, new, folder_mode):
    os.chmod(folder, folder_mode)
    os.chmod(folder / "unet", folder_mode)
    os.chmod(folder / "README.md", 0o640)
    os.chmod(folder / "unet/notes.txt", 0o400)
    if os.geteuid() == 0:
        os.chown(folder / "README.md", 12, 34)
    before = {file: os.stat(folder / file)[:6] for file in ("README.md", "unet/notes.txt", "figures/a/b.png", ".git")}
    new.save_pretrained(folder)
    assert mode(folder) == mode(folder / "unet") == folder_mode
    assert {file: os.stat(folder / file)[:6] for file in before} == before
    if folder_mode & stat.S_ISGID:
        assert os.stat(folder / UNET).st_gid == os.stat(folder / "unet").st_gid


@pytest.mark.parametrize("umask", (0o022, 0o077, 0o002))
@pytest.mark.parametrize("size", ("10GB", "20KB"))
def test_new_files_have_the_umasks_mode(tmp_path, new, umask, size):
    def run():
        os.umask(umask)
        new.save_pretrained(tmp_path / "sd", max_shard_size=size)

    assert exit_code(in_child(run)) == 0
    files = [file for file in (tmp_path / "sd").rglob("*") if file.is_file()]
    assert {mode(file) for file in files} == {0o666 & ~umask}
    assert {mode(file) for file in (tmp_path / "sd", tmp_path / "sd/unet")} == {0o777 & ~umask}


JSONS = ("unet/config.json", "model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("file", (UNET, *JSONS))
def test_a_file_that_may_not_be_read_is_said_to_be(open_place, folder, file):
    place = shutil.copytree(folder, open_place / "sd")
    os.chmod(place / file, 0)
    said = as_nobody(lambda: m.StableDiffusionPipeline.from_pretrained(place))
    assert said == f"LoadError: {place / file}: permission denied"


def test_a_pickle_that_may_not_be_read_is_said_to_be(open_place, folder):
    place = shutil.copytree(folder, open_place / "sd")
    (place / UNET).unlink()
    torch.save({}, place / "unet/diffusion_pytorch_model.bin")
    os.chmod(place / "unet/diffusion_pytorch_model.bin", 0)
    assert "bin: permission denied" in as_nobody(lambda: m.StableDiffusionPipeline.from_pretrained(place))


def test_another_user_reads_what_was_saved(open_place, new):
    new.save_pretrained(open_place / "sd")
    assert as_nobody(lambda: contents(open_place / "sd")) == ""


# Links


@pytest.mark.parametrize("file", (UNET, "unet/config.json", "model_index.json", "tokenizer/tokenizer.json"))
def test_a_link_to_nothing_is_said_to_be_one(folder, file):
    (folder / file).unlink()
    (folder / file).symlink_to("../blobs/0123")
    with pytest.raises(m.LoadError, match=re.escape(f"{folder / file}: a link to ../blobs/0123, which isn't there")):
        m.StableDiffusionPipeline.from_pretrained(folder)


def test_links_stay_and_what_files_point_to_is_not_touched(folder, new, tmp_path):
    """A linked folder is written through; a linked file, as in the Hub's cache, is replaced and its target kept."""
    (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to("../elsewhere")
    blob = tmp_path / "blob"
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(blob)
    (folder / "vae/diffusion_pytorch_model.safetensors").symlink_to("../../blob")
    (folder / "dangling").symlink_to("nowhere")
    before = blob.read_bytes()
    new.save_pretrained(folder)
    assert contents(folder) == NEW
    assert os.readlink(folder / "unet") == "../elsewhere" and os.readlink(folder / "dangling") == "nowhere"
    assert blob.read_bytes() == before
    assert not (folder / "vae/diffusion_pytorch_model.safetensors").is_symlink()


def test_two_parts_in_one_folder_are_refused(folder, new):
    shutil.rmtree(folder / "vae")
    (folder / "vae").symlink_to("unet")
    with pytest.raises(m.LoadError, match="two of its parts are links to one folder"):
        new.save_pretrained(folder)
    assert not leftovers(folder)


@pytest.mark.parametrize("name", ("unet", "unet/config.json"))
def test_what_is_in_the_way_is_named(folder, new, name):
    place = folder / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.write_text("mine") if name == "unet" else place.mkdir()
    with pytest.raises(m.LoadError, match=f"{place}: a .* of that name is in the way"):
        new.save_pretrained(folder)
    assert not leftovers(folder)


# Several at once


def test_two_processes_save_in_turn(folder, tiny_sd_folder):
    """Whoever comes last wins, whole; nothing of the other is left, and nothing foreign is lost."""
    pipes = [filled(tiny_sd_folder, value) for value in (OLD, NEW)]
    for _ in range(5):
        children = [in_child(lambda pipe=pipe: pipe.save_pretrained(folder)) for pipe in pipes for _ in range(2)]
        while any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for child in children):
            assert contents(folder) in (OLD, NEW)
        assert [exit_code(child) for child in children] == [0] * 4
        assert contents(folder) in (OLD, NEW)
        check_foreign_files(folder)
        assert not leftovers(folder)


def test_two_threads_save_in_turn(folder, tiny_sd_folder):
    threads = [
        threading.Thread(target=filled(tiny_sd_folder, value).save_pretrained, args=(folder,)) for value in (OLD, NEW)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(folder) in (OLD, NEW) and not leftovers(folder)


def test_a_reader_finds_the_old_pipeline_while_a_save_goes_on(folder, new, monkeypatch):
    found, write_to = [], m.PNDMScheduler.write_to

    def meanwhile(*args):
        found.append(contents(folder))
        write_to(*args)

    monkeypatch.setattr(m.PNDMScheduler, "write_to", meanwhile)
    new.save_pretrained(folder)
    assert found == [OLD] and contents(folder) == NEW


def cut_off(folder, pipe, monkeypatch, after):
    """Leaves `folder` as a save does that dies after `after` renames of its last step."""
    replace, calls = os.replace, []

    def dying(source, target):
        if len(calls) > after:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", dying)
        pipe.save_pretrained(folder)


@pytest.mark.parametrize("after", (0, 1, 4))
def test_whoever_comes_next_finishes_a_save_that_was_cut_off(folder, new, tiny_sd_folder, monkeypatch, after):
    """The pipeline's reader, a component's by its own folder and by `subfolder`, a save of the whole and of a part."""
    old = filled(tiny_sd_folder, OLD)
    finds = {
        "pipeline": lambda: None,
        "unet": lambda: m.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "subfolder": lambda: m.AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "part": lambda: new.vae.save_pretrained(folder / "vae"),
    }
    for find in finds.values():
        old.save_pretrained(folder)
        cut_off(folder, new, monkeypatch, after)
        assert (folder / save.JOURNAL).exists()
        find()
        assert contents(folder) == NEW and not leftovers(folder)
        check_foreign_files(folder)
    cut_off(folder, old, monkeypatch, after)
    new.save_pretrained(folder)
    assert contents(folder) == NEW and not leftovers(folder)


def test_a_last_step_that_cannot_be_done_is_said_and_done_later(folder, new, monkeypatch):
    """As on Windows, where a file that a loaded model is mapped to can't be replaced."""
    replace = os.replace

    def locked(source, target):
        if str(target).endswith(UNET):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(target))
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", locked)
        for action in (new.save_pretrained, m.StableDiffusionPipeline.from_pretrained):
            with pytest.raises(m.LoadError, match=r"a save is complete, but its last step.*on Windows"):
                action(folder)
    assert contents(folder) == NEW and not leftovers(folder)


@pytest.mark.parametrize("journal", ({"..": []}, {"a/b": []}, {"unet": ["../README.md"]}, {"unet": 3}, {"": [1]}))
def test_a_journal_from_elsewhere_touches_nothing(folder, journal):
    save.write_json(folder / save.JOURNAL, journal)
    with pytest.raises(m.LoadError, match="isn't what a save writes there"):
        m.StableDiffusionPipeline.from_pretrained(folder)
    check_foreign_files(folder)


def test_a_journal_from_elsewhere_does_not_reach_through_links(folder, tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/key").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "private")
    (folder / "unet" / save.STAGE).symlink_to(tmp_path / "private")
    save.write_json(folder / save.JOURNAL, {"link": ["key"], "unet": []})
    assert contents(folder) == OLD
    assert (tmp_path / "private/key").read_text() == "mine"


def test_file_systems_without_locks(folder, new, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(save.fcntl, "flock", without)
    new.save_pretrained(folder)
    assert contents(folder) == NEW and not leftovers(folder)


def test_a_machine_without_fcntl(folder, new, monkeypatch):
    monkeypatch.setattr(save, "fcntl", None)
    new.save_pretrained(folder)
    assert contents(folder) == NEW and not leftovers(folder)


def test_a_pipeline_survives_a_save_over_its_own_files(tiny_sd_folder, tmp_path):
    """Its tensors are pages of the files that are replaced."""
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "sd")
    pipe = m.StableDiffusionPipeline.from_pretrained(folder)
    expected = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    again = m.StableDiffusionPipeline.from_pretrained(folder)
    for _ in range(2):
        pipe.save_pretrained(folder)
    for unet in (pipe.unet, again.unet, m.StableDiffusionPipeline.from_pretrained(folder).unet):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


# Networks that aren't what their config makes


class Wrapped(torch.nn.Module):
    """A layer with a low-rank addition, as people write it by hand."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down = layer, torch.nn.Linear(layer.in_features, 2, bias=False)

    def forward(self, x):
        return self.layer(x)


def test_wrapped_layers_are_named(folder, tiny_sd_folder):
    pipe = m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    pipe.unet.time_mlp.fc1 = Wrapped(pipe.unet.time_mlp.fc1)
    with pytest.raises(ValueError, match=r"Without a place: time_mlp\.fc1\.layer\.weight.*Missing: time_mlp\.fc1\.w"):
        pipe.save_pretrained(folder)
    assert contents(folder) == OLD and not leftovers(folder)


def test_added_buffers_other_shapes_and_tensors_without_values_are_named(tiny_models, tmp_path):
    unet = tiny_models["UNet2DModel"]
    with pytest.raises(ValueError, match=r"conv_in\.weight .* is on the meta device"):
        type(unet).from_config(unet.config).to("meta").save_pretrained(tmp_path / "unet")
    unet.conv_in = torch.nn.Conv2d(5, 8, 3, padding=1)
    with pytest.raises(ValueError, match=r"conv_in\.weight .* shape \(8, 5, 3, 3\), but its config makes it \(8, 3"):
        unet.save_pretrained(tmp_path / "unet")
    vae = tiny_models["AutoencoderKL"]
    vae.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match=r"Without a place: scale\. Missing: none"):
        vae.save_pretrained(tmp_path / "vae")
    assert not os.listdir(tmp_path)


def test_tied_tensors_are_saved_twice(tiny_models, tmp_path):
    unet = tiny_models["UNet2DModel"]
    unet.mid.resnets[0].conv1.weight = unet.mid.resnets[0].conv2.weight
    unet.save_pretrained(tmp_path / "unet")
    again = type(unet).from_pretrained(tmp_path / "unet")
    assert torch.equal(again.mid.resnets[0].conv1.weight, unet.mid.resnets[0].conv2.weight)


@pytest.mark.parametrize("where", ("whole", "part", "in place"))
def test_compiled_networks_are_saved_under_their_own_names(tiny_sd_folder, tmp_path, where):
    pipe = m.StableDiffusionPipeline.from_pretrained(tiny_sd_folder)
    if where == "whole":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif where == "part":
        pipe.unet.mid = torch.compile(pipe.unet.mid, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    pipe.save_pretrained(tmp_path / "sd")
    pipe.unet.save_pretrained(tmp_path / "unet")
    for file in (tmp_path / "sd" / UNET, tmp_path / "unet/diffusion_pytorch_model.safetensors"):
        saved, source = load_file(file), load_file(tiny_sd_folder / UNET)
        assert saved.keys() == source.keys() and all(torch.equal(saved[name], source[name]) for name in saved)
    assert (tmp_path / "sd/model_index.json").read_text() == (tiny_sd_folder / "model_index.json").read_text()
