"""Every error that a client can see: one table from exceptions to OpenAI's error object.

What is in an exception's message reaches the client only where the table says so; anything that is
not in the table is our fault, logged with its traceback and answered with a general 500.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gateway.admission import QueueTimeout
from gateway.conversation import NoChatTemplate
from gateway.embedding import NoEmbeddings
from gateway.helper import HelperUnavailable
from gateway.origins import ForeignPage
from gateway.prompt.template import TemplateRefused
from gateway.prompt.tokenizer import ControlTokenInText
from gateway.protocol.common import InvalidField
from gateway.protocol.fields import UnknownField, UnsupportedField
from gateway.protocol.json_body import MalformedBody
from gateway.protocol.unserved import why_unserved
from gateway.recovery import PoisonedRequest
from gateway.response_store import PreviousResponseNotFound, ResponseNotFound
from gateway.router import ModelFailed, ModelNotFound, ShuttingDown
from gateway.sequence_stream import ContextLengthExceeded, SequenceFailed, SequenceRefused
from gateway.tenant import LargerThanLimit, RateLimited
from gateway.workers.protocol import QueueFull, WorkerLost, WorkerUnavailable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

logger = logging.getLogger(__name__)


class InvalidKey(Exception):  # noqa: N818
    """No API key, or one that is not known."""


class BodyTooLarge(Exception):  # noqa: N818
    """The body is longer than the server allows."""


class MalformedRequest(Exception):  # noqa: N818
    """What came over the connection is not HTTP, or not safely so."""


class HeadersTooLarge(Exception):  # noqa: N818
    """More headers, or longer ones, than the server allows."""


class ReceiptTimeout(Exception):  # noqa: N818
    """The request was not complete in time."""


class TooManyConnections(Exception):  # noqa: N818
    """As many connections are open as the server holds."""


class ClientGone(Exception):  # noqa: N818
    """The client closed its connection: nobody reads the answer, only the log and the metrics do."""


class Row(NamedTuple):
    status: int
    type: str
    code: str | None
    message: str | None = None  # None: the exception's own, which is written for the client
    param: str | None = None  # unless the exception names one
    should_retry: bool = True  # False: it would end the same way, so the SDK is told not to
    retry_after: int | None = None  # seconds, unless the exception says


_INVALID = "invalid_request_error"
_SERVER = "server_error"

TABLE: dict[type[Exception], Row] = {
    MalformedBody: Row(400, _INVALID, None),
    UnknownField: Row(400, _INVALID, None),
    UnsupportedField: Row(400, _INVALID, "unsupported_parameter"),
    InvalidField: Row(400, _INVALID, "invalid_value"),
    pydantic.ValidationError: Row(400, _INVALID, "invalid_value"),
    NoEmbeddings: Row(400, _INVALID, "no_embeddings", param="model"),
    NoChatTemplate: Row(400, _INVALID, "no_chat_template", param="model"),
    TemplateRefused: Row(400, _INVALID, "invalid_value", param="messages"),
    ControlTokenInText: Row(400, _INVALID, "invalid_value", param="messages"),
    ContextLengthExceeded: Row(400, _INVALID, "context_length_exceeded"),
    SequenceRefused: Row(400, _INVALID, "invalid_value"),
    InvalidKey: Row(401, _INVALID, "invalid_api_key"),
    ForeignPage: Row(403, _INVALID, "foreign_origin"),
    ResponseNotFound: Row(404, _INVALID, None),
    PreviousResponseNotFound: Row(400, _INVALID, "previous_response_not_found"),
    ModelNotFound: Row(404, _INVALID, "model_not_found"),
    BodyTooLarge: Row(413, _INVALID, "request_too_large"),
    MalformedRequest: Row(400, _INVALID, "malformed_request"),
    HeadersTooLarge: Row(431, _INVALID, "headers_too_large"),
    ReceiptTimeout: Row(408, _INVALID, "request_timeout"),
    ClientGone: Row(499, _INVALID, "client_gone", "The client closed the connection."),
    ClientDisconnect: Row(499, _INVALID, "client_gone", "The client closed the connection."),
    RateLimited: Row(429, "rate_limit_error", "rate_limit_exceeded", retry_after=1),
    LargerThanLimit: Row(429, "rate_limit_error", "request_over_limit", should_retry=False),
    QueueFull: Row(429, "rate_limit_error", "queue_full", retry_after=1),
    SequenceFailed: Row(500, _SERVER, "generation_failed", "The generation failed.", should_retry=False),
    HelperUnavailable: Row(
        503,
        _SERVER,
        "helper_unavailable",
        "The server could not prepare the request: a process that it needs cannot run. Try again.",
        retry_after=1,
    ),
    TooManyConnections: Row(503, _SERVER, "too_many_connections", retry_after=1),
    QueueTimeout: Row(503, _SERVER, "queue_timeout", retry_after=1),
    PoisonedRequest: Row(
        500,
        _SERVER,
        "request_poisoned",
        "The workers ended twice while they served this request. It is not tried again.",
        should_retry=False,
    ),
    ShuttingDown: Row(503, _SERVER, "shutting_down", retry_after=1),
    WorkerUnavailable: Row(
        503, _SERVER, "model_not_ready", "The model is not ready. Try again.", retry_after=1
    ),
    WorkerLost: Row(
        503, _SERVER, "worker_lost", "The workers that served this request have ended.", retry_after=1
    ),
    ModelFailed: Row(503, _SERVER, "model_failed", should_retry=False),
    TimeoutError: Row(504, _SERVER, "timeout", "The model did not answer in time.", should_retry=False),
}

_UNEXPECTED = Row(500, _SERVER, "internal_error", "The server had an error.", should_retry=False)

ROWS = (*TABLE.values(), _UNEXPECTED)
"""What a route can answer with."""

_HTTP = {
    404: Row(404, _INVALID, None),
    405: Row(405, _INVALID, "method_not_supported"),
}


_UNSERVED = Row(404, _INVALID, "endpoint_not_served")


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct, frozen=True):
    """The body of every response that is an error, and the data of a stream's event that is one."""

    error: ErrorObject


class APIError(NamedTuple):
    """An error ready to be sent, as a response of its own or inside a stream."""

    status: int
    error: ErrorObject
    headers: dict[str, str]

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(Error(self.error))

    @property
    def label(self) -> str:
        """For metrics: one of a fixed set."""
        return self.error.code or str(self.status)


def to_api_error(error: Exception, *, method: str = "", path: str = "", request_id: str = "") -> APIError:
    """What the client is told. Logs what it is not told, if that is our fault."""
    error = _unwrapped(error)
    if isinstance(error, HTTPException):
        return _from_http(error, method, path)
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    if row is None:
        logger.error("unexpected error in %s", _where(method, path, request_id), exc_info=error)
        row = _UNEXPECTED
    elif row.status >= 500:
        logger.warning("%s: %s: %s", _where(method, path, request_id), type(error).__name__, error)
    return _api_error(row, *_message(error, row), getattr(error, "retry_after", row.retry_after))


def _where(method: str, path: str, request_id: str) -> str:
    return f"{method} {path[:200]}{f' ({request_id})' if request_id else ''}"


def _unwrapped(error: Exception) -> Exception:
    """One of our own exceptions that pydantic carried out of a validator."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, UnknownField):
            return inner.inside(_place(first))
        if isinstance(inner, Exception) and type(inner) in TABLE:
            return inner
    return error


def _message(error: Exception, row: Row) -> tuple[str, str | None]:
    if isinstance(error, pydantic.ValidationError):
        return _first_problem(error)
    return row.message or str(error), getattr(error, "param", row.param)


def _first_problem(error: pydantic.ValidationError) -> tuple[str, str]:
    """The message and the path of the first thing that is wrong: messages[0].role."""
    first = error.errors(include_url=False, include_input=True)[0]
    param = _place(first)
    if first["type"] == "missing":
        return f"Missing required parameter: '{param}'.", param
    problem = _plain(first)
    found = first["input"]
    shown = f" (found {str(found)[:40]})" if isinstance(found, int | float) else ""
    return f"Invalid value for '{param}': {problem[:1].lower()}{problem[1:]}{shown}.", param


def _place(problem: ErrorDetails) -> str:
    """Where: messages[0].role; empty for the request itself."""
    steps = [step for step in problem["loc"] if isinstance(step, int) or _is_field(step)]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _plain(problem: ErrorDetails) -> str:
    """What is wrong, without pydantic's own words for the lengths of lists."""
    match problem:
        case {"type": "too_short", "ctx": {"min_length": least, "actual_length": found}}:
            return f"expected at least {least} item{'s' * (least != 1)}, not {found}"
        case {"type": "too_long", "ctx": {"max_length": most}}:
            return f"expected at most {most} item{'s' * (most != 1)}"
    return problem["msg"].removeprefix("Value error, ")


def _is_field(step: str) -> bool:
    """Pydantic puts the branch of a union and the place in a dict among the fields: list[str], [key]."""
    return step.isidentifier()


_NO_ENDPOINT = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED)  # of some that we know, we know why


def _from_http(error: HTTPException, method: str, path: str) -> APIError:
    row = _HTTP.get(error.status_code, Row(error.status_code, _INVALID, None))
    why = why_unserved(path) if error.status_code in _NO_ENDPOINT else None
    message = {
        404: f"Invalid URL ({method} {path[:200]})",
        405: f"Not allowed to {method} on {path[:200]}.",
    }.get(error.status_code, HTTPStatus(error.status_code).phrase)
    if why is not None:
        row, message = _UNSERVED, f"Invalid URL ({method} {path[:200]}): it is not served here; {why}"
    api_error = _api_error(row, message, None, None)
    return api_error._replace(headers=api_error.headers | dict(error.headers or {}))


def _api_error(row: Row, message: str, param: str | None, retry_after: int | None) -> APIError:
    headers = {}
    if not row.should_retry:
        headers["x-should-retry"] = "false"
    if retry_after is not None:
        headers["retry-after"] = str(max(1, round(retry_after)))
    if row.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return APIError(row.status, ErrorObject(message, row.type, param, row.code), headers)
