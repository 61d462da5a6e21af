"""Errors in Anthropic's words, for the paths that are Anthropic's."""

from __future__ import annotations

import msgspec

from gateway.errors import APIError

_PATH = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetails(msgspec.Struct, frozen=True):
    error_code: str


class AnthropicErrorObject(msgspec.Struct, frozen=True):
    type: str
    message: str
    details: AnthropicErrorDetails | msgspec.UnsetType = msgspec.UNSET  # where clients go by them


_NO_THREADS = AnthropicErrorDetails("thread_unsupported_request")
"""Clients go on without: they send all messages then."""


class AnthropicError(msgspec.Struct, frozen=True, tag="error"):
    error: AnthropicErrorObject
    request_id: str


def is_anthropic(path: str) -> bool:
    return path == _PATH or path.startswith(f"{_PATH}/")


def error_body(error: APIError, path: str, request_id: str) -> bytes:
    """The body of a response to a request for `path`."""
    return anthropic_body(error, request_id) if is_anthropic(path) else error.body


def anthropic_body(error: APIError, request_id: str) -> bytes:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    if error.error.code == "model_failed":  # for good
        kind = "api_error"
    message = error.error.message
    if error.error.code == "context_length_exceeded":  # the words by which clients know to shorten it
        message = f"prompt is too long: {message}"
    is_thread = error.error.code == "unsupported_parameter" and error.error.param == "thread"
    details = _NO_THREADS if is_thread else msgspec.UNSET
    return msgspec.json.encode(AnthropicError(AnthropicErrorObject(kind, message, details), request_id))
