"""Why a group died, where it could not say so itself: from the logs of its ranks and its exit code."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_TAIL_BYTES = 64 << 10
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)", re.MULTILINE)
_FATAL = re.compile(r"^Fatal Python error: .*", re.MULTILINE)
_MAX_CHARS = 500


def last_words(log_dir: Path, launcher_log: Path) -> str | None:
    """The error that ended the first rank to fail, from the `*.log` files below `log_dir`: of those that
    show one, the oldest. Else what the launcher says of itself. None when nobody says anything."""
    logs = sorted(log_dir.rglob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    errors = [_error_in(_tail(path)) for path in logs if path != launcher_log]
    said = [error for error in [*errors, _launcher_error(launcher_log)] if error is not None]
    return said[0][:_MAX_CHARS] if said else None


def describe_exit(code: int) -> str:
    """An exit code of the guard in words: 128 + n and -n are signal n."""
    number = code - 128 if code > 128 else -code
    if number > 0 and number in list(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    return f"ended with code {code}"


def _error_in(text: str) -> str | None:
    """The last uncaught error that a log shows, on one line."""
    errors: list[str] = _TRACEBACK.findall(text) + _FATAL.findall(text)
    return errors[-1] if errors else None


def _launcher_error(path: Path) -> str | None:
    """Its last line; but that a rank failed is no news."""
    lines = _tail(path).split("\n") if path.exists() else []
    said = [line for line in lines if line.strip() and not line.startswith((" ", "="))]
    return said[-1] if said and "ChildFailedError" not in "".join(lines) else None


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        return file.read().decode("utf-8", "replace")
