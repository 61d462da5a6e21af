"""Why a group died, where it could not say so itself: from the logs of its ranks and its exit code."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

_TAIL_BYTES = 64 << 10
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)", re.MULTILINE)
_FATAL = re.compile(r"^Fatal Python error: .*", re.MULTILINE)
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
_MAX_CHARS = 500

# torchrun's words, in the order in which it writes them: a line at once, a table when all ranks have ended.
_FAILED = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)")
_IN_TABLE = re.compile(r"rank +: (?P<rank>\d+) \(local_rank: \d+\)\n +exitcode +: (?P<code>-?\d+)")
_TORCHRUN = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d")  # how the lines of its log begin
_RANK = re.compile(r"\d{4}-\d\d-\d\d \S+ rank \d+ [A-Z]+ ")  # and those of a rank that needs no torchrun

# What a rank says when another one is gone: gloo's and NCCL's words, and those of the store.
_ECHO = re.compile(
    r"gloo|Connection (?:closed|reset) by peer|Connection reset|Broken pipe|DistNetworkError|DistBackendError"
    r"|ncclRemoteError|NCCL communicator was aborted",
    re.IGNORECASE,
)


def last_words(log_dir: Path, launcher_log: Path) -> str | None:
    """Which rank was killed by what signal, if the launcher says so. Else the error that ended the first
    rank to fail, from the `*.log` files below `log_dir`: of those that show one, the oldest; of ranks that
    only miss another one, none. Else what the launcher says of itself. None when nobody says anything."""
    launcher = _tail(launcher_log) if launcher_log.exists() else ""
    if killed := _killed_rank(launcher):
        return killed
    logs = sorted(log_dir.rglob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    errors = [_error_in(_tail(path)) for path in logs if path != launcher_log]
    said = [error for error in [*errors, _launcher_error(launcher)] if error is not None]
    own = [error for error in said if not is_echo(error)]
    if own:
        return own[0][:_MAX_CHARS]
    return "a rank was lost: the others lost the connection to it" if said else None


def is_echo(error: str) -> bool:
    """Whether an error only tells that another rank is gone."""
    return _ECHO.search(error) is not None


def names_a_rank(launcher_log: Path) -> bool:
    """Whether the launcher has written which rank failed."""
    return launcher_log.exists() and next(_ends(_tail(launcher_log)), None) is not None


def describe_exit(code: int) -> str:
    """An exit code of the guard in words: 128 + n and -n are signal n."""
    name = _signal_name(code - 128 if code > 128 else -code)
    return f"ended by {name}" if name else f"ended with code {code}"


def _killed_rank(launcher: str) -> str | None:
    """The first rank that a signal ended, not counting the signal by which torchrun ends the others."""
    for rank, code in _ends(launcher):
        if code < 0 and code != -signal.SIGTERM:
            return f"rank {rank} was ended by {_signal_name(-code) or f'signal {-code}'}"
    return None


def _ends(launcher: str) -> Iterator[tuple[int, int]]:
    """(rank, exit code) of the ranks that torchrun tells of. On one machine, local ranks are ranks."""
    for pattern in (_FAILED, _IN_TABLE):
        for match in pattern.finditer(launcher):
            yield int(match["rank"]), int(match["code"])


def _signal_name(number: int) -> str | None:
    return signal.Signals(number).name if number in list(signal.Signals) else None


def _error_in(text: str) -> str | None:
    """The last uncaught error that a log shows, on one line."""
    text = _RANK_PREFIX.sub("", text)
    errors: list[str] = _TRACEBACK.findall(text) + _FATAL.findall(text)
    return errors[-1] if errors else None


def _launcher_error(text: str) -> str | None:
    """Its last line; but that a rank failed, or is being ended, is no news."""
    lines = [line for line in text.split("\n") if not _TORCHRUN.match(line) and not _RANK.match(line)]
    said = [line for line in lines if line.strip() and not line.startswith((" ", "="))]
    return said[-1] if said and "ChildFailedError" not in text else None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace")
