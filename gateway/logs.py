"""What the gateway writes to standard error: lines of text, or of JSON, with the request they belong to."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that this task answers."""

access = logging.getLogger("gateway.access")
"""A line a request. Its records have `fields`: what happened, and nothing that the request said."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_WITHHELD = "(its message may quote the request; --log-level debug shows it)"


def set_up(level: str, log_format: LogFormat) -> None:
    """Once, for the whole process."""
    handler = logging.StreamHandler(_CurrentStderr())
    handler.setFormatter((JsonFormatter if log_format == "json" else TextFormatter)())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    def formatException(self, ei: object) -> str:  # noqa: N802
        """Where it was raised. What it says is left out where a request may have put words into its mouth."""
        error = ei[1] if isinstance(ei, tuple) else None
        assert isinstance(error, BaseException), "only what was raised is logged"
        if request_id.get() is None or logging.getLogger().isEnabledFor(logging.DEBUG):
            return "".join(traceback.format_exception(error)).rstrip()
        return "\n".join(_without_messages(error))


class TextFormatter(_Formatter):
    """Time, level, message. A message is one line, whatever is in it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # as another formatter wrote it, with everything
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = getattr(record, "fields", {})
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        record.message = _CONTROL.sub(_escape, record.message + pairs)
        return super().formatMessage(record)


class JsonFormatter(_Formatter):
    """An object a line: time, level, logger, message; request_id, fields and exception where there are."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (id := request_id.get()) is not None:
            line["request_id"] = id
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)  # in ASCII: nothing in it ends the line or steers a terminal


def last_words(message: str, log_format: LogFormat) -> str:
    """A line for an error that ends the process, whether logging has been set up or not."""
    if log_format == "text":
        return f"sluice: error: {message}"
    record = {"name": "gateway", "levelno": logging.ERROR, "levelname": "ERROR", "msg": message}
    return JsonFormatter().format(logging.makeLogRecord(record))


def log_access(method: str, path: bytes, status: int, seconds: float, key: str | None) -> None:
    """One request has been answered. `path` as it was sent, without its query."""
    if access.isEnabledFor(logging.INFO):
        fields = {
            "method": method[:20],
            "path": path[:200].decode("ascii", "backslashreplace"),
            "status": status,
            "ms": round(1000 * seconds),
            "key": key or "-",
            "request_id": request_id.get() or "-",
        }
        access.info("request", extra={"fields": fields})


def _without_messages(error: BaseException) -> list[str]:
    """A traceback, and those it came from, innermost first."""
    lines = []
    origin = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if origin is not None:
        lines = [*_without_messages(origin), "and then"]
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return [*lines, frames, f"{type(error).__qualname__} {_WITHHELD}"]


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class _CurrentStderr:
    """Standard error as it is at each write: the progress bar puts itself in front of it for a while."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()
