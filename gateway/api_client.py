"""What `sluice chat` and `sluice bench` ask of a server first, and how they say that it refused."""

from __future__ import annotations

import json

import httpx

_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 300.0


class ServerError(Exception):
    """The server refused, failed or cannot be reached. The message is for the user."""


def base_url(url: str) -> str:
    """The API's base without /v1; an address without a scheme is http's. Raises ServerError."""
    full = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(full)
    except httpx.InvalidURL as error:
        raise ServerError(f"--url {url}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerError(f"--url {url} is not an http:// or https:// address")
    return full.rstrip("/").removesuffix("/v1")


def connect(url: str, api_key: str | None) -> httpx.Client:
    """A client for the API whose base is `url`, with or without scheme and /v1. Raises ServerError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS)
    return httpx.Client(base_url=base_url(url), headers=headers, timeout=timeout)


def choose_model(client: httpx.Client, wanted: str | None) -> str:
    """`wanted` if the server lists it or lists nothing; without, the first one listed. Raises ServerError."""
    names = _list_models(client)
    if wanted is not None and (not names or wanted in names):
        return wanted
    if wanted is not None:
        raise ServerError(f"there is no model {wanted!r} at {client.base_url}; there are: {', '.join(names)}")
    if not names:
        raise ServerError(f"{client.base_url} lists no models; name one with --model")
    return names[0]


def _list_models(client: httpx.Client) -> list[str]:
    """Empty where the server does not know the endpoint."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ServerError(unreachable(str(client.base_url), error)) from None
    if response.status_code == httpx.codes.NOT_FOUND:
        return []
    if response.status_code != httpx.codes.OK:
        raise ServerError(refusal(response.status_code, response.text))
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"{client.base_url} is not an OpenAI-compatible server: GET /v1/models") from None


def refusal(status: int, text: str) -> str:
    """What an answer that is not 200 says: OpenAI's message, or the body's beginning."""
    try:
        return f"{json.loads(text)['error']['message']} (HTTP {status})"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {status}: {text[:200]}"


def unreachable(where: str, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError | ConnectionRefusedError):
        return f"nothing answers at {where}; is `sluice serve` running there?"
    return f"no answer from {where}: {str(error) or type(error).__name__}; is `sluice serve` running there?"
