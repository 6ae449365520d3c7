"""Many prompts, many processes: the same files whoever draws them, and nothing lost or drawn twice where one dies."""

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_faults_saves import in_child

import minidiff
import minidiff.batch
from minidiff.__main__ import main
from minidiff.loading.save import locked
from minidiff.manifest import MANIFEST, add_record, sharing

KILLS = int(os.environ.get("MINIDIFF_KILLS", "4"))  # 20 take a minute
LINES = [{"prompt": f"{('red', 'apple', 'red apple')[i % 3]}", "seed": i} for i in range(11)]
for i, more in {2: {"steps": 3}, 4: {"width": 24}, 5: {"negative": "red"}, 7: {"steps": 3}, 9: {"guidance": 1}}.items():
    LINES[i] |= more


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A place of its own with a file of lines in five shapes; the function writes others."""
    monkeypatch.chdir(tmp_path)

    def write(*lines):
        Path("prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    write(*LINES)
    return write


@pytest.fixture
def arguments(tiny_sd_folder):
    def make(out, *more):
        given = ["--model", str(tiny_sd_folder), "--prompts", "prompts.jsonl", "--steps", "2", "--device", "cpu"]
        return [*given, "-o", str(out), *more]

    return make


@pytest.fixture
def draw(prompts, arguments):
    return lambda out, *more: main(arguments(out, *more))


def start(size, arguments, before=lambda rank: None):
    """Forks of this process that draw together, as torchrun would start them. Returns their process ids."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 70
            try:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
                for stream, name in ((1, "out.txt"), (2, "err.txt")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                before(rank)
                code = main(arguments)
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)
        children.append(child)
    return children


def codes(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def rows_of(out):
    file = Path(out, MANIFEST)
    rows = file.read_bytes().split(b"\n")[:-1] if file.exists() else []  # the last may be half written
    return [json.loads(row) for row in rows]


def files(out):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(out).glob("*.png")}


def pixels(file):
    with Image.open(file) as picture:
        return np.asarray(picture).astype(int)


def manifest(out):
    """Its records by line, each of which is there once and tells the truth about its file."""
    records = rows_of(out)
    assert len({record["line"] for record in records}) == len(records)
    assert {record["file"]: record["sha256"] for record in records} == files(out)
    return {record["line"]: record for record in records}


@pytest.mark.parametrize("batch", (1, 4))
def test_one_two_and_three_processes_draw_the_same_files(draw, arguments, batch):
    assert draw("alone", "--batch", str(batch)) == 0
    assert sorted(manifest("alone")) == list(range(1, len(LINES) + 1))
    for size in (1, 2, 3):
        assert codes(start(size, arguments(f"by {size}", "--batch", str(batch)))) == [0] * size
        manifest(f"by {size}")
        assert files(f"by {size}") == files("alone")


def test_a_picture_is_the_commands_own(draw, prompts, arguments, tiny_sd_folder):
    """Of one width the same to the bit, beside whatever else it is drawn; of another width within rounding."""
    assert draw("pictures", "--batch", "1") == draw("fours", "--batch", "4") == 0
    line = LINES[5]
    flags = ["--negative", line["negative"], "--seed", str(line["seed"]), "--steps", "2", "--device", "cpu"]
    assert main([line["prompt"], *flags, "--model", str(tiny_sd_folder), "-o", "alone.png"]) == 0
    with (
        Image.open("alone.png") as alone,
        Image.open("pictures/00006.png") as one,
        Image.open("fours/00006.png") as four,
    ):
        assert alone.text == one.text == four.text
        assert np.array_equal(np.asarray(alone), np.asarray(one))
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(four)).max() <= 1
    prompts(LINES[8], LINES[0])
    assert draw("few", "--batch", "4") == 0
    assert files("few") == {"00001.png": files("fours")["00009.png"], "00002.png": files("fours")["00001.png"]}


def test_pictures_of_a_line_and_what_it_begins_with(draw, prompts, tiny_sd_folder):
    """-n makes a grid with its seeds; image, mask and strength go to the pipelines that take them."""
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)):
        Image.fromarray(picture).save(f"{i}.png")
    Image.fromarray(np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(16, 1)).save("mask.png")
    begun = {"prompt": "red", "height": 16, "width": 16, "image": "0.png", "strength": 0.5}
    masked = {"prompt": "red", "image": "0.png", "mask": "mask.png", "strength": 1}
    twice = [begun | {"n": 2}, begun | {"n": 2, "seed": 1}]
    prompts({"prompt": "red", "n": 3}, {"prompt": "red", "seed": 2}, begun, begun | {"image": "1.png"}, masked, *twice)
    assert draw("out", "--batch", "2") == 0
    grid, third, first, other, inside, pair, next_pair = (pixels(f"out/{number:05}.png") for number in range(1, 8))
    assert grid.shape == (32, 32, 3) and np.abs(grid[16:, :16] - third).max() <= 1
    assert not np.array_equal(first, other)
    assert pair.shape == (16, 32, 3) and np.abs(pair[:, :16] - first).max() <= 1
    assert np.abs(pair[:, 16:] - next_pair[:, :16]).max() <= 1  # of seed 1 both
    pipe = minidiff.StableDiffusionInpaintPipeline.from_pretrained(tiny_sd_folder)
    given = {"image": Image.open("0.png"), "mask_image": Image.open("mask.png"), "num_inference_steps": 2}
    seeded = torch.Generator().manual_seed(0)
    expected = pipe("red", **given, strength=1.0, generator=seeded).images[0]
    assert np.abs(inside - np.asarray(expected)).max() <= 1


BAD = {
    "": None,
    "not JSON": "Expecting value",
    '["red"]': "must be an object with a prompt",
    '{"seed": 1}': "must be an object with a prompt",
    '{"prompt": "red", "sed": 1}': "'sed' is not known: did you mean 'seed'?",
    '{"prompt": "red", "model": "x"}': "'model' is not known: a line takes prompt, negative,",
    '{"prompt": "red", "seed": null}': "seed is null, which is neither a text nor a number",
    '{"prompt": "red", "seed": 1.5}': "argument --seed: invalid int value: '1.5'",
    '{"prompt": "red", "n": 0}': "argument -n: 0 must be 1 or more",
    '{"prompt": "red", "strength": 1}': "argument --strength: needs --image",
    '{"prompt": "red", "height": 17}': "--height=17 must be a positive multiple of",
    '{"prompt": "red", "image": "nowhere.png"}': "--image: image='nowhere.png' is no file here",
    '{"prompt": "\\ud800"}': "surrogates not allowed",
    '{"prompt": "--seed=3", "negative": "-x"}': None,
    "\udcff": "can't decode byte",
}


def test_bad_lines_are_told_by_number_and_end_nothing(draw, arguments, prompts, capsys):
    rows = ["\ufeff" + json.dumps(LINES[0]), *BAD, json.dumps(LINES[1])]
    Path("prompts.jsonl").write_text("\r\n".join(rows), encoding="utf-8", errors="surrogateescape")
    wrong = [number for number, message in enumerate(BAD.values(), 2) if message]
    for out, size, more in (("out", 0, ()), ("by 2", 2, ("--batch", "2"))):
        assert codes(start(size, arguments(out, *more))) == [1] * size if size else draw(out, *more) == 1
        told = Path("err.txt").read_text() if size else capsys.readouterr().err
        for number, message in enumerate(BAD.values(), 2):
            assert (f"line {number}: " in told) == (message is not None)
            assert message is None or any(message in row for row in told.splitlines() if f"line {number}: " in row)
        assert f"error: no picture of {len(wrong)} lines: {', '.join(map(str, wrong))}" in told
        assert sorted(manifest(out)) == [1, 15, len(rows)]
    assert files("out").keys() == files("by 2").keys()
    assert manifest("out")[15]["settings"]["prompt"] == "--seed=3"


def test_a_start_draws_what_is_not_there(draw, arguments, prompts, capsys, monkeypatch):
    assert draw("out", "--batch", "3") == 0
    before = {file: (file.read_bytes(), file.stat().st_ino) for file in Path("out").glob("*.png")}
    with monkeypatch.context() as patch:
        patch.setattr(minidiff.batch, "load", None)  # nothing is to be drawn, and nothing is loaded
        assert draw("out", "--batch", "3") == 0
    assert f"0 pictures drawn in 0 s by 1 at work, {len(LINES)} were there" in capsys.readouterr().out
    Path("out/00001.png").unlink()
    Path("out/00002.png").write_bytes(b"something else")
    prompts(*LINES[:2], LINES[2] | {"seed": 99}, *LINES[3:], {"prompt": "red"})
    assert codes(start(2, arguments("out", "--batch", "3"))) == [0, 0]
    assert re.search(rf"4 pictures drawn in . s by 2 at work, {len(LINES) - 3} were there", Path("out.txt").read_text())
    assert {file.name for file, (data, _) in before.items() if file.read_bytes() != data} == {"00003.png"}
    again = {file.name for file, (_, inode) in before.items() if file.stat().st_ino != inode}
    assert again == {"00001.png", "00003.png"} | ({"00002.png"} & again)
    records = [json.loads(row) for row in Path("out", MANIFEST).read_text().splitlines()]
    assert sorted(record["line"] for record in records[len(LINES) :]) == [1, 2, 3, len(LINES) + 1]
    assert draw("out", "--guidance", "3") == 0  # the command's settings are those of lines that say nothing else
    assert f"{len(LINES)} pictures drawn in" in capsys.readouterr().out


def test_a_start_draws_what_begins_with_other_files_now(draw, prompts, tiny_sd_folder, capsys):
    """Files of the same name and size; and another dtype."""
    pipe = minidiff.DiffusionPipeline.from_pretrained(tiny_sd_folder)
    parameters = minidiff.lora.add(pipe.unet, rank=2)

    def save(name, seed):
        if name == "lora":
            generator = torch.Generator().manual_seed(seed)
            for parameter in parameters:
                parameter.data = torch.randn(parameter.shape, generator=generator)
            pipe.save_lora_weights("lora", minidiff.lora.state_dict(pipe.unet))
        else:
            Image.new("RGB", (16, 16), (seed, seed, seed)).save(name)

    for name in ("in.png", "mask.png", "lora"):
        save(name, 9)
    prompts(
        {"prompt": "red"}, {"prompt": "red", "image": "in.png"}, {"prompt": "a", "image": "in.png", "mask": "mask.png"}
    )
    flags = ("--lora", "lora:0.5")
    assert draw("out", *flags) == 0
    for name, count in ((None, 0), ("in.png", 2), ("mask.png", 1), ("lora", 3)):
        save(name, 200) if name else None
        capsys.readouterr()
        assert draw("out", *flags) == 0
        assert f"{count} pictures drawn" in capsys.readouterr().out, name
    assert draw("out", *flags, "--dtype", "bfloat16") == 0
    assert "3 pictures drawn" in capsys.readouterr().out
    assert draw("out", *flags, "--optimize") == 0
    assert "3 pictures drawn" in capsys.readouterr().out
    assert {row["settings"]["dtype"] for row in rows_of("out")} == {"float32", "bfloat16"}
    assert {row["settings"]["device"] for row in rows_of("out")} == {"cpu"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts", "nope.jsonl"], "argument --prompts: nope.jsonl must be a file that can be read"),
        (["--prompts", "."], "argument --prompts: . must be a file that can be read"),
        (["--prompts", ""], "argument --prompts: is empty"),
        (["-o", ""], "argument --output: is empty"),
        (["-o", "prompts.jsonl"], "error: -o: prompts.jsonl can't be a folder for pictures: File exists"),
        (["-o", "prompts.jsonl/x"], "error: -o: prompts.jsonl/x can't be a folder for pictures: Not a directory"),
    ],
)
def test_places_that_are_none_are_told_by_their_flags(draw, tmp_path, capsys, more, message):
    try:
        assert draw("out", *more) == 1
    except SystemExit as caught:
        assert caught.code == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_one_process_says_why_none_can_begin(draw, arguments):
    assert codes(start(2, arguments("prompts.jsonl"))) == [1, 1]
    assert Path("err.txt").read_text() == "error: -o: prompts.jsonl can't be a folder for pictures: File exists\n"


@pytest.mark.parametrize("cut", (1, 2, 40, 10**6))
def test_half_a_record_is_cut_off(draw, arguments, cut):
    assert draw("out", "--batch", "2") == 0
    first, file = manifest("out"), Path("out", MANIFEST)
    rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(rows[:-1]) + rows[-1][: max(1, len(rows[-1]) - cut)])
    assert codes(start(2, arguments("out", "--batch", "2"))) == [0, 0]
    second = manifest("out")
    assert {line: record["sha256"] for line, record in second.items()} == {
        line: record["sha256"] for line, record in first.items()
    }


def test_a_manifest_of_something_else(draw, capsys):
    Path("out").mkdir()
    for row in ("nonsense", "[]", '{"line": 1}'):
        Path("out", MANIFEST).write_text(f"{row}\n")
        assert draw("out") == 1
        assert capsys.readouterr().err.startswith(f"error: out/{MANIFEST}, line 1: not a picture's record. Delete")
        assert Path("out", MANIFEST).read_text() == f"{row}\n"


def test_records_are_whole_whoever_writes_beside_or_dies(tmp_path):
    """Four processes at once, one of which leaves half a record now and then."""
    (tmp_path / MANIFEST).touch()

    def write(rank):
        for i in range(50):
            add_record(tmp_path, {"rank": rank, "i": i, "text": "x" * (i * 97 % 700)})
            if rank == 0 and i % 10 == 0:
                with locked([tmp_path / MANIFEST]), open(tmp_path / MANIFEST, "ab") as file:
                    file.write(b'{"half": "a rec')

    children = [in_child(lambda: write(rank)) for rank in range(4)]  # noqa: B023
    assert codes(children) == [0] * 4
    records = [json.loads(row) for row in (tmp_path / MANIFEST).read_text().splitlines()]
    assert sorted((record["rank"], record["i"]) for record in records) == [(r, i) for r in range(4) for i in range(50)]


def test_a_run_has_the_folder_for_itself(draw, capsys):
    Path("out").mkdir()
    with sharing(Path("out")):
        assert draw("out") == 1
    assert capsys.readouterr().err == "error: out: another run draws into it\n"
    assert draw("out") == 0


def test_no_run_begins_while_another_is_about_to_draw(draw, capsys, monkeypatch):
    told, begun = minidiff.batch.told, []

    def tell(value, group):  # the first one knows what is to be drawn, and hasn't begun
        if not begun:
            begun.append(None)
            begun[0] = draw("out")
        return told(value, group)

    monkeypatch.setattr(minidiff.batch, "told", tell)
    assert draw("out") == 0 and begun == [1]
    assert "error: out: another run draws into it\n" in capsys.readouterr().err
    manifest("out")


def lost(children, chosen):
    """Kills one of the processes, and does with the others as torchrun would. Returns their exit codes."""
    os.kill(children[chosen], signal.SIGKILL)
    others = [child for child in children if child != children[chosen]]
    for child in others:
        os.kill(child, signal.SIGTERM)
    return codes(children)


def test_killed_at_random_moments(draw, arguments):
    """Whatever a process was at: what is in the manifest is there, and the next start, of any size, draws the rest."""
    begun = time.perf_counter()
    assert codes(start(2, arguments("whole"))) == [0, 0]
    whole, seconds = files("whole"), time.perf_counter() - begun
    choose, midway = random.Random(0), 0
    for kill in range(KILLS):
        out, size = f"out {kill}", choose.choice((1, 2, 3))
        children = start(size, arguments(out))
        time.sleep(choose.uniform(0.2, 1.1) * seconds)
        chosen = choose.randrange(size)
        ends = lost(children, chosen)
        records, found = rows_of(out), files(out)
        assert all(found[record["file"]] == record["sha256"] == whole[record["file"]] for record in records)
        assert ends[chosen] == -signal.SIGKILL or len(records) == len(LINES)
        assert len(records) == len(LINES) or not any(code == 0 for code in ends)
        midway += 0 < len(records) < len(LINES)
        size = choose.choice((1, 2, 3))
        assert codes(start(size, arguments(out))) == [0] * size
        assert sorted(manifest(out)) == list(range(1, len(LINES) + 1))
        assert files(out) == whole
        assert not list(Path(out).glob(".*.tmp"))
    print(f"{KILLS} kills, {midway} of them with some pictures drawn and others not")


def test_who_dies_loses_what_it_was_drawing_alone(draw, arguments):
    def die(rank):
        write, drawn = minidiff.batch.write, Path("drawn")

        def last(*given):  # the others wait, else the machine may give them all lines before this one begins
            if rank == 1:
                drawn.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            until = time.monotonic() + 60
            while not drawn.exists() and time.monotonic() < until:
                time.sleep(0.01)
            return write(*given)

        minidiff.batch.write = last

    assert codes(start(3, arguments("out"), before=die)) == [1, -signal.SIGKILL, 1]
    assert "error: another process died, and what it was drawing isn't there" in Path("err.txt").read_text()
    assert len(manifest("out")) == len(LINES) - 1
    assert draw("out") == 0
    assert len(manifest("out")) == len(LINES)


def test_who_is_told_to_stop_ends_its_batch(draw, arguments, capsys):
    write = minidiff.batch.write

    def stop(rank):
        minidiff.batch.write = lambda *given: (os.kill(os.getpid(), signal.SIGTERM), write(*given))

    assert codes(start(1, arguments("out", "--batch", "4"), before=stop)) == [1]
    assert "told to stop; the same command goes on from here" in Path("err.txt").read_text()
    assert len(manifest("out")) == 4
    assert draw("out", "--batch", "4") == 0
    assert f"{len(LINES) - 4} pictures drawn" in capsys.readouterr().out


def test_under_torchrun(draw, arguments, prompts, capsys):
    """A worker is killed, and torchrun starts both again, as it may; one more, and the exit code says so. Another
    start draws the rest."""
    prompts(*({"prompt": "red", "seed": i} for i in range(200)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(minidiff.__file__).parents[1])}
    command = [*torchrun, "-m", "minidiff", *arguments("out")]
    there = 0
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as run:
        for chosen in (1, 0):
            while len(rows_of("out")) < there + 3:
                assert run.poll() is None
                time.sleep(0.02)
            killed = workers_of(run)
            os.kill(killed[chosen], signal.SIGKILL)
            while set(killed) & set(workers_of(run)):  # the other one ends its picture
                time.sleep(0.02)
            there = len(rows_of("out"))  # of whole lines; a picture may lie there already whose line doesn't
        assert run.wait(60) == 1
    assert 6 <= there < 200
    assert draw("out") == 0
    assert f"{200 - there} pictures drawn" in capsys.readouterr().out
    assert len(manifest("out")) == 200


def workers_of(run):
    file = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []
