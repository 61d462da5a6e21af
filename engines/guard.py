"""Sees to it that a worker group leaves nothing behind: `python -m engines.guard RUN_DIR -- ARGV...`

The gateway starts one guard a group and holds the write end of its stdin. The guard starts ARGV and waits.
When ARGV exits, when stdin or the process of the gateway ends (however it died) or on SIGTERM, it kills what
ARGV has started, in whatever session, removes RUN_DIR and what carries its name in /dev/shm, and exits with
ARGV's code (128 + n for signal n). It is a child subreaper, so nobody below can get out of its sight; ARGV
gets SIGKILL when the guard itself dies.

Standard library only: it starts within tens of milliseconds and holds little memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

SHARED_MEMORY = Path("/dev/shm")
MIN_NAME_LENGTH = 8
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_KILL_INTERVAL = 0.005  # seconds between rounds of killing
_USAGE = f"usage: python -m engines.guard RUN_DIR -- ARGV... (RUN_DIR's name: {MIN_NAME_LENGTH}+ characters)"


def main(argv: list[str]) -> int:
    """Returns the exit code: ARGV's, or 128 + SIGTERM when it was ended."""
    if len(argv) < 3 or argv[1] != "--" or len(Path(argv[0]).name) < MIN_NAME_LENGTH:
        print(_USAGE, file=sys.stderr)
        return 2
    run_dir, command, gateway = Path(argv[0]), argv[2:], os.getppid()
    wakeup = _wake_on_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    code, gateway_lives = _wait(_start(command), wakeup)
    kill_descendants()
    remove_traces(run_dir)
    if not gateway_lives:
        _remove_sockets(run_dir.parent, gateway)
    return code


def kill_descendants() -> None:
    """SIGKILL to every process below this one, over and over until none is left. Needs a subreaper:
    then 'no children' means 'no descendants'."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, has_others = _reap()
        if not has_others:
            return
        time.sleep(_KILL_INTERVAL)


def remove_traces(run_dir: Path) -> None:
    """Remove a run directory, and the shared memory whose names contain its name. What is gone already,
    or belongs to somebody else, is passed over."""
    shutil.rmtree(run_dir, ignore_errors=True)
    for entry in SHARED_MEMORY.glob(f"*{run_dir.name}*"):
        with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError):
            entry.unlink()


def _remove_sockets(directory: Path, gateway: int) -> None:
    """Those where the gateway that had this pid could be reached: gateway/handover.py."""
    for path in directory.glob(f"sluice.{gateway}.*.sock"):
        with contextlib.suppress(OSError):
            path.unlink()


def _start(command: list[str]) -> int:
    """The pid of `command`, which gets nothing to read and dies with this process."""
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(command, guard)
    return pid


def _become(command: list[str], guard: int) -> NoReturn:
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:  # else the guard died before it could be told
            os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


def _wait(child: int, wakeup: int) -> tuple[int, bool]:
    """Until `child` exits, stdin or the parent ends or an ending signal comes. Reaps orphans meanwhile.
    The exit code, and whether the gateway still lives: it closes our stdin only by its own end."""
    poll = select.poll()
    parent = _parent()
    for source in (0, wakeup, parent):
        poll.register(source, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if parent in ready or (0 in ready and not os.read(0, 4096)):
            return 128 + signal.SIGTERM, False
        if wakeup in ready and any(number in _ENDING for number in os.read(wakeup, 4096)):
            return 128 + signal.SIGTERM, True
        ended, _ = _reap()
        if child in ended:
            code = os.waitstatus_to_exitcode(ended[child])
            return (code if code >= 0 else 128 - code), True


def _parent() -> int:
    """A descriptor that becomes readable when the gateway ends. Its pipe alone would not tell if a process
    that it had forked held the pipe too."""
    return os.pidfd_open(os.getppid())


def _reap() -> tuple[dict[int, int], bool]:
    """Wait statuses of the children that have ended, by pid; and whether there are others."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = status


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, nearest first. Those that come and go meanwhile may be missed."""
    found = [pid]
    for parent in found:
        found += _children(parent)
    return found[1:]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tasks = os.listdir(f"/proc/{pid}/task")
        return [child for task in tasks for child in _children_of_thread(pid, task)]
    return []


def _children_of_thread(pid: int, task: str) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return []


def _wake_on_signals() -> int:
    """A file descriptor on which the number of each signal that arrives can be read as a byte."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*_ENDING, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return read_end


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
