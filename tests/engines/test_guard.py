"""The guard with real processes: whatever way a group ends, nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engines.guard import SHARED_MEMORY

Start = Callable[..., subprocess.Popen[bytes]]
REPO = Path(__file__).parents[2]
NAP = [sys.executable, "-S", "-c", "import time; time.sleep(100)"]
TREE = """
import os, subprocess, sys, time
nap = sys.argv[2:]
child = subprocess.Popen(nap, start_new_session=True)
# An orphan: its parent is gone at once, and it is in a session of its own.
double = "import subprocess as s, sys; print(s.Popen(sys.argv[1:], start_new_session=True, stdout=-3).pid)"
orphan = subprocess.run([sys.executable, "-S", "-c", double, *nap], stdout=-1, text=True).stdout
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid} {orphan} .")
time.sleep(100)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / f"sluice-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir(mode=0o700)
    (path / "launch.json").write_text("{}")
    shared = SHARED_MEMORY / f"{path.name}-plans"
    shared.write_text("x")
    yield path
    shared.unlink(missing_ok=True)


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    """Starts a guard over a command; whatever happens, it is gone after the test."""
    guards: list[subprocess.Popen[bytes]] = []

    def start_guard(*command: str, directory: Path = run_dir) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "engines.guard", str(directory), "--", *command]
        guards.append(subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=REPO))
        return guards[-1]

    yield start_guard
    for guard in guards:
        close_stdin(guard)
        guard.wait(10)


def start_tree(start: Start, tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A guard over a small tree; the pids of what it must kill, that of the command itself first."""
    pids = tmp_path / "pids"
    guard = start(sys.executable, "-S", "-c", TREE, str(pids), *NAP)
    wait_until(lambda: pids.exists() and pids.read_text().endswith("."))
    return guard, [int(word) for word in pids.read_text().split()[:-1]]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


def assert_nothing_left(run_dir: Path, pids: list[int]) -> None:
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not run_dir.exists()
    assert list(SHARED_MEMORY.glob(f"*{run_dir.name}*")) == []


def close_stdin(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()


@pytest.mark.parametrize("end", [close_stdin, subprocess.Popen.terminate], ids=["stdin ends", "SIGTERM"])
def test_the_whole_tree_is_killed(
    end: Callable[[subprocess.Popen[bytes]], None], start: Start, run_dir: Path, tmp_path: Path
) -> None:
    guard, pids = start_tree(start, tmp_path)
    end(guard)
    assert guard.wait(10) == 128 + signal.SIGTERM
    assert_nothing_left(run_dir, pids)


FORKING_GATEWAY = """
import os, subprocess, sys, time
guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
if os.fork() == 0:  # holds the guard's stdin, too
    time.sleep(3)
    os._exit(0)
time.sleep(100)
"""


def test_a_forked_copy_of_the_pipe_does_not_keep_the_group(run_dir: Path) -> None:
    argv = [sys.executable, "-m", "engines.guard", str(run_dir), "--", *NAP]
    with subprocess.Popen([sys.executable, "-S", "-c", FORKING_GATEWAY, *argv], cwd=REPO) as gateway:
        wait_until(lambda: len(psutil.Process(gateway.pid).children(recursive=True)) == 3)
        (copy,) = [each for each in psutil.Process(gateway.pid).children() if each.cmdline()[1] != "-m"]
        gateway.kill()
    wait_until(lambda: not run_dir.exists(), 2.0)
    assert copy.is_running()
    copy.kill()


def test_the_end_of_the_command_ends_what_it_left_behind(start: Start, run_dir: Path, tmp_path: Path) -> None:
    guard, pids = start_tree(start, tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    assert guard.wait(10) == 128 + signal.SIGKILL
    assert_nothing_left(run_dir, pids)


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_code_of_the_command_is_passed_on(program: str, code: int, start: Start, run_dir: Path) -> None:
    guard = start(sys.executable, "-S", "-c", program)
    assert guard.wait(10) == code
    assert_nothing_left(run_dir, [])


def test_a_command_that_cannot_start(start: Start, run_dir: Path) -> None:
    guard = start("/no/such/program")
    assert guard.wait(10) == 127
    assert_nothing_left(run_dir, [])


def test_the_command_dies_with_a_killed_guard(start: Start, run_dir: Path, tmp_path: Path) -> None:
    guard = start(*NAP)
    wait_until(lambda: bool(psutil.Process(guard.pid).children()))
    child = psutil.Process(guard.pid).children()[0]
    wait_until(lambda: "sleep" in " ".join(child.cmdline()))
    guard.kill()
    assert guard.wait(10) == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(child.pid))


def test_the_command_has_nothing_to_read(start: Start, run_dir: Path) -> None:
    guard = start(sys.executable, "-S", "-c", "import sys; sys.exit(len(sys.stdin.read()))")
    assert guard.wait(10) == 0


def test_wrong_arguments_touch_nothing(start: Start, run_dir: Path) -> None:
    guard = start("true", directory=Path("/tmp"))
    assert guard.wait(10) == 2
    assert Path("/tmp").is_dir()
