"""The layers around the application: keys, request ids, the limit on bodies."""

from __future__ import annotations

import hmac
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gateway.auth import ApiKeys
from gateway.errors import InvalidKey
from gateway.keys import KeyRing
from gateway.settings import Settings
from tests.fakes import FakeGroup
from tests.gateway.serving import client_of, listening, make_app, make_group

pytestmark = pytest.mark.anyio
KEYS = Settings(api_keys=("first-key", "schlüssel"))
BODY = {"model": "demo", "prompt": "hi", "max_tokens": 1}


PATHS: list[Callable[[str], str]] = [
    lambda path: path,
    lambda path: f"/{path}",
    lambda path: f"//livez/{path}",
    lambda path: f"/.{path}",
    lambda path: f"/livez/..{path}",
    lambda path: f"/livez/%2e%2e{path}",
    lambda path: f"/livez%2f..{path}",
    lambda path: f"/livez/..;{path}",
    lambda path: f"/livez;{path}",
    lambda path: f"/livez%00{path}",
    lambda path: f"/livez\\..{path}",
    lambda path: f"{path}/",
    lambda path: f"{path}/.",
    lambda path: f"{path}/../livez",
    lambda path: f"{path}%20",
    lambda path: f"{path};/livez",
    lambda path: f"{path}?/livez",
    lambda path: f"{path}?x=/livez&api_key=first-key&key=first-key",
    lambda path: f"{path}#/livez",
    lambda path: path.upper(),
    lambda path: "/" + "".join(f"%{ord(c):02x}" for c in path[1:]),
    lambda path: f"http://livez{path}",
    lambda path: f"http://127.0.0.1/livez/..{path}",
    lambda path: f"/livez{path}",
    lambda path: f"/readyz/x{path}",
]
HEADERS = [
    "Host: livez",
    "Host: a/livez?x=",
    "Host: a/livez#",
    "Host: livez:0/livez",
    "X-Original-URL: /livez",
    "X-Rewrite-URL: /livez",
    "X-Forwarded-Prefix: /livez",
    "X-HTTP-Method-Override: GET",
    "X-Forwarded-For: 127.0.0.1",
    "Authorization: first-key",
    "Authorization: Bearer",
    "Authorization: Basic first-key",
    "Authorization: Bearer x\r\nX-Api-Key: first-key",
    "X-Api-Key:",
    "X-Api-Key: first-ke",
    "Cookie: api_key=first-key; authorization=Bearer first-key",
]
METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "BREW"]
ROUTES = [
    "/v1/models",
    "/v1/models/demo",
    "/v1/chat/completions",
    "/v1/completions",
    "/metrics",
    "/health",
    "/nope",
    "/openapi.json",
    "/status",
    "/drain",
    "/reload-keys",
    "/groups/fake/0/restart",
]


@pytest.fixture(scope="module")
def closed_server(model_dir: Path) -> Iterator[tuple[tuple[str, int], FakeGroup]]:
    """A real server with keys on a real socket."""
    group = make_group(model_dir)
    with listening(make_app(model_dir, group, settings=KEYS)) as url:
        host, port = url.removeprefix("http://").split(":")
        yield (host, int(port)), group


def raw_request(address: tuple[str, int], method: str, target: str, *headers: str) -> tuple[int, bytes]:
    """Status and body; 0 when the server closed without a word."""
    if not any(header.startswith("Host:") for header in headers):
        headers = ("Host: localhost", *headers)
    prompt = b'"messages": [{"role": "user", "content": "hi"}]' if "chat" in target else b'"prompt": "hi"'
    body = b'{"model": "demo", %b}' % prompt
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *headers, f"Content-Length: {len(body)}"])
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode("latin-1") + body)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    return (int(answer.split(b" ")[1]), answer.partition(b"\r\n\r\n")[2]) if answer else (0, b"")


@pytest.mark.parametrize("path", ROUTES)
def test_without_a_key_every_path_is_closed(
    closed_server: tuple[tuple[str, int], FakeGroup], path: str
) -> None:
    """Every route, also those that are not there, in every guise: 401, or 400 from the parser."""
    address, group = closed_server
    variants = [
        *((method, path, ()) for method in [*METHODS, "CONNECT"]),
        *((method, change(path), ()) for method in ("GET", "POST") for change in PATHS),
        *((method, path, (header,)) for method in ("GET", "POST") for header in HEADERS),
        ("GET", path, ("Host: a", "Host: livez")),
    ]
    assert len(variants) >= 40
    for method, target, headers in variants:
        status, body = raw_request(address, method, target, *headers)
        # The parser ends a request that CONNECT opens a tunnel with; nothing of ours ever sees it.
        assert status in (400, 401), (method, target, headers, status, body)
        assert b"demo" not in body
        assert b"first-key" not in body
    assert group.requests == []


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("header", ["Authorization: Bearer first-key", "x-api-key: first-key"])
def test_with_a_key_the_same_paths_answer(
    closed_server: tuple[tuple[str, int], FakeGroup], path: str, header: str
) -> None:
    """What the test above finds closed is there; the admin surface and pages of documentation are not, for
    anybody."""
    status, _ = raw_request(closed_server[0], "POST" if "completions" in path else "GET", path, header)
    assert status == (200 if path.startswith(("/v1", "/metrics", "/health", "/openapi.json")) else 404)
    closed_server[1].requests.clear()


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/livez?x=1"])
def test_probes_are_open_to_get_and_head_only(
    closed_server: tuple[tuple[str, int], FakeGroup], path: str
) -> None:
    statuses = {method: raw_request(closed_server[0], method, path)[0] for method in METHODS}
    assert statuses.pop("GET") == 200
    assert statuses.pop("HEAD") in (200, 405)
    assert statuses.pop("BREW") in (400, 401)  # the parser knows its methods
    assert set(statuses.values()) == {401}


async def test_what_is_not_http_is_closed_too(model_dir: Path) -> None:
    """No server of ours opens websockets; if one did, this layer would still stand before them."""
    app = ApiKeys(make_app(model_dir, make_group(model_dir)), KeyRing(["first-key"]))
    scope = {"type": "websocket", "path": "/livez", "raw_path": b"/livez", "headers": []}
    with pytest.raises(InvalidKey):
        await app(scope, _never, _never)


async def _never(*_: object) -> Any:
    raise AssertionError("nothing is to be sent or received")


def test_finding_a_key_takes_as_long_whatever_was_given() -> None:
    """Every known digest is compared, whether or not one before was right, by what does not stop early."""
    ring = KeyRing([f"key-number-{number}" for number in range(20)])
    for given in (b"key-number-0", b"key-number-19", b"wrong", b"", None):
        with mock.patch("gateway.keys.hmac.compare_digest", wraps=hmac.compare_digest) as compare:
            found = ring.find(given)
        assert compare.call_count == 20
        assert (found is not None) == (given is not None and given.startswith(b"key-"))


@pytest.mark.parametrize(
    "header",
    [
        "",
        "first-key",
        "Bearer",
        "Bearer ",
        "Bearer first-ke",
        "Bearer first-key2",
        "Basic first-key",
        "Bearer x y",
    ],
)
async def test_a_wrong_key_is_refused(model_dir: Path, header: str) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir), settings=KEYS)) as client:
        response = await client.get("/v1/models", headers={"authorization": header})
    assert response.status_code == 401
    assert "first-key" not in response.text


async def test_a_known_key_is_let_through(model_dir: Path) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir), settings=KEYS)) as client:
        for key in KEYS.api_keys:
            headers = {b"authorization": f"Bearer {key}".encode()}
            response = await client.post("/v1/completions", json=BODY, headers=headers)
            assert response.status_code == 200


async def test_probes_need_no_key(model_dir: Path) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir), settings=KEYS)) as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz?x=1")).status_code == 200


async def test_without_keys_everybody_may_ask(model_dir: Path) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        response = await client.get("/v1/models", headers={"authorization": "Bearer whatever"})
    assert response.status_code == 200


@pytest.mark.parametrize("given", ["abc.DEF_1-2", "x" * 64])
async def test_a_harmless_request_id_comes_back(model_dir: Path, given: str) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        response = await client.get("/livez", headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert int(response.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "ü"])
async def test_any_other_request_id_is_replaced(model_dir: Path, given: str) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        response = await client.get("/livez", headers={b"x-request-id": given.encode()})
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_body_may_be_as_long_as_the_limit_and_no_longer(model_dir: Path) -> None:
    app = make_app(model_dir, make_group(model_dir), settings=Settings(max_body_bytes=1_000))
    body = b'{"model": "demo", "prompt": "hi", "max_tokens": 1}'

    async def in_parts(content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    async with client_of(app) as client:
        for content in (body.ljust(1_000), in_parts(body.ljust(1_000))):
            assert (await client.post("/v1/completions", content=content)).status_code == 200
        for content in (body.ljust(1_001), in_parts(body.ljust(1_001))):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="ping_interval"):
        Settings(ping_interval=0)
    with pytest.raises(ValueError, match="empty"):
        Settings(api_keys=("",))
