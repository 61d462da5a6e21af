"""Killed or out of room, a conversion leaves the target absent or complete, and can be resumed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from typer.testing import CliRunner

from conversion.hashed import HashedFile
from conversion.job import Options
from conversion.journal import locked, partial_dir
from conversion.open import open_checkpoint
from conversion.plan import OutputFile, Target
from conversion.tensors import CannotConvert
from conversion.verify import _at_once, _check_file, _check_zip
from engines.base import BadCheckpoint
from engines.models.manifest import read_manifest
from gateway.cli import app
from tests.conversion import interrupted
from tests.conversion.helpers import convert
from tests.models import GQA, MHA, make_llama

ROOT = Path(__file__).parents[2]


def test_killed_and_full_at_random_points(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.soak.convert_interrupted", "--trials", "24"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(argv, capture_output=True, text=True, timeout=600, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout)
    assert figures["kills_in_the_middle"] > 5, figures
    assert figures["size_limits_in_the_middle"] >= 1, figures
    assert figures["full_disks"] == 0 or figures["full_disks_in_the_middle"] >= 1, figures


class Interruption(Exception):  # noqa: N818
    pass


class FakeProgress:
    """Stops the conversion when it has begun a number of files."""

    def __init__(self, num_files: int) -> None:
        self.left, self.started = num_files, list[str]()

    def start(self, file: str, num_bytes: int) -> None:
        if self.left == 0:
            raise Interruption
        self.left -= 1
        self.started.append(file)

    def advance(self, file: str, num_bytes: int) -> None:
        """Nothing."""

    def finish(self, file: str, sha256: str) -> None:
        """Nothing."""


def test_resuming_writes_only_what_is_missing(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    target, how = tmp_path / "out", Target("sluice", tp=4)
    first = FakeProgress(2)
    with pytest.raises(Interruption):
        convert(hf, target, how, Options(jobs=1), progress=first)
    assert not target.exists()
    assert len(first.started) == 2
    second = FakeProgress(9)
    convert(hf, target, how, Options(jobs=1, resume=True), progress=second)
    assert len(second.started) == 2
    assert not set(first.started) & set(second.started)
    assert interrupted.is_same(hf, target)
    assert not partial_dir(target).exists()


def interrupted_once(hf: Path, target: Path, how: Target) -> None:
    with pytest.raises(Interruption):
        convert(hf, target, how, Options(jobs=1), progress=FakeProgress(1))


def test_resuming_another_conversion_is_refused(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    interrupted_once(hf, tmp_path / "out", Target("sluice", tp=2))
    with pytest.raises(CannotConvert, match="left by another conversion than this one"):
        convert(hf, tmp_path / "out", Target("sluice", tp=4), Options(resume=True))


def test_resuming_after_the_source_changed_is_refused(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA)
    interrupted_once(hf, tmp_path / "out", Target("sluice", tp=2))
    make_llama(hf, MHA, seed=1)
    with pytest.raises(CannotConvert, match="left by another conversion than this one"):
        convert(hf, tmp_path / "out", Target("sluice", tp=2), Options(resume=True))


def test_a_torn_journal_costs_one_file(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    target, how = tmp_path / "out", Target("sluice", tp=2)
    interrupted_once(hf, target, how)
    journal = partial_dir(target) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    progress = FakeProgress(9)
    convert(hf, target, how, Options(jobs=1, resume=True), progress=progress)
    assert len(progress.started) == 2
    assert interrupted.is_same(hf, target)


def test_a_file_that_vanished_is_written_again(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    target, how = tmp_path / "out", Target("sluice", tp=2)
    interrupted_once(hf, target, how)
    next((partial_dir(target) / "out").rglob("*.safetensors")).unlink()
    convert(hf, target, how, Options(jobs=1, resume=True))
    assert interrupted.is_same(hf, target)


def test_two_conversions_into_one_target_do_not_mix(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    with locked(partial_dir(tmp_path / "out")), pytest.raises(CannotConvert, match="another conversion"):
        convert(hf, tmp_path / "out", Target("hf"))


def test_a_target_that_is_there_is_left_alone(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(CannotConvert, match="is there already"):
        convert(hf, tmp_path / "out", Target("hf"))
    for inside in (hf / "inside", hf):  # which nobody is told to remove
        with pytest.raises(CannotConvert, match="lies in the source"):
            convert(hf, inside, Target("hf"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    how = Target("sluice", tp=2)
    monkeypatch.setattr(OutputFile, "num_bytes", property(lambda self: 1 << 60))
    for target in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
        with pytest.raises(CannotConvert, match=rf"{target}: needs 2,\S+ TB, and the disk of {tmp_path} has"):
            convert(hf, target, how)
    assert list(tmp_path.iterdir()) == [hf]


@pytest.mark.parametrize("num_finished", [0, 1])
def test_no_room_leaves_only_what_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_finished: int
) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    target, how = tmp_path / "out", Target("sluice", tp=2)
    with pytest.raises(Interruption):
        convert(hf, target, how, Options(jobs=1), progress=FakeProgress(num_finished))
    with monkeypatch.context() as patched:
        patched.setattr(OutputFile, "num_bytes", property(lambda self: 1 << 60))
        with pytest.raises(CannotConvert, match="make room"):
            convert(hf, target, how, Options(resume=True))
    assert partial_dir(target).exists() == (num_finished > 0)
    progress = FakeProgress(9)
    convert(hf, target, how, Options(jobs=1, resume=True), progress=progress)
    assert len(progress.started) == 2 - num_finished


def test_what_is_refused_early_leaves_nothing(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    with pytest.raises(ValueError, match=r"absent\.model"):
        convert(hf, tmp_path / "out", Target("hf", tokenizer=str(tmp_path / "absent.model")))
    assert list(tmp_path.iterdir()) == [hf]


def test_a_disk_that_fills_up_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HashedFile) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hf = make_llama(tmp_path / "hf", GQA)
    with monkeypatch.context() as patched:
        patched.setattr(HashedFile, "drain", full)
        with pytest.raises(
            CannotConvert, match=r"model\.safetensors: tensor .*: No space left .*: make room, and"
        ):
            convert(hf, tmp_path / "out", Target("hf"))
    convert(hf, tmp_path / "out", Target("hf"), Options(resume=True))


INTERRUPTS_ITSELF = """
import os, signal, sys, time
from conversion import job
from gateway.cli import app

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
write_file, written = job.write_file, []

def interrupted(path, file, window_bytes, advance):
    if not written:
        written.append(file)
        return write_file(path, file, window_bytes, advance)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(6000):
        time.sleep(0.01)
        advance(0)
    os._exit(99)

job.write_file = interrupted
app()
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, as_json: bool) -> None:
    """It comes while the second of four files is written, which stops at once."""
    hf = make_llama(tmp_path / "hf", GQA)
    target = tmp_path / "out"
    command = ["convert", str(hf), str(target), "--to", "sluice", "--tp", "4", "--jobs", "1"]
    command += ["--json"] if as_json else []
    argv = [sys.executable, "-c", INTERRUPTS_ITSELF, *command]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=ROOT)
    partial = partial_dir(target)
    message = (
        "interrupted: 1 of 4 file(s) of weights are finished: run the same command with --resume to go on, "
        f"or remove {partial}"
    )
    assert (result.returncode, result.stderr) == (130, f"sluice: error: {message}\n")
    if as_json:
        event = json.loads(result.stdout.splitlines()[-1])
        assert (event["event"], event["message"], event["exit_code"]) == ("error", message, 130)
    assert not target.exists()
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert as_json or f"{target}: 1.2 MB\n" in result.output  # and no speed, as if all had been written now
    assert interrupted.is_same(hf, target)
    assert not partial.exists()


def test_hashing_stops_at_ctrl_c() -> None:
    told, has_begun = list[bool](), Event()

    def until_told(stop: Event) -> int:
        has_begun.set()
        told.append(stop.wait(60))
        return 0

    def raise_interrupt(stop: Event) -> int:
        assert has_begun.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _at_once(2, [raise_interrupt, until_told])
    assert told == [True]


def test_hashing_that_is_told_to_stop_reads_no_further(tmp_path: Path) -> None:
    """A damaged file is not found by who does not read it."""
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "m", Target("meta"))
    path, stop = tmp_path / "m" / "consolidated.00.pth", Event()
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="is damaged"):
        _check_zip(path, stop)
    manifest = read_manifest(tmp_path / "m")
    assert manifest is not None
    with pytest.raises(BadCheckpoint, match="its sha256"):
        _check_file(path.parent, path.name, manifest.files[path.name], stop)
    stop.set()
    _check_zip(path, stop)
    _check_file(path.parent, path.name, manifest.files[path.name], stop)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CannotConvert, match="choose a target that you may write to"):
        convert(hf, tmp_path / "locked" / "out", Target("hf"))


def test_the_source_is_only_read(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in hf.iterdir()}
    convert(hf, tmp_path / "meta", Target("meta", shards=2))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in hf.iterdir()} == before
    assert open_checkpoint(tmp_path / "meta").files
