"""Web pages of other origins and a server without keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.origins import is_own
from gateway.settings import Settings
from tests.gateway.serving import client_of, make_app, make_group

pytestmark = pytest.mark.anyio
EVIL = "https://evil.example"
ASK = {"model": "demo", "prompt": "hi", "max_tokens": 1}


@pytest.mark.parametrize(
    ("origin", "host", "address"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "127.0.0.1"),
        ("http://localhost:9000", "localhost:9000", "127.0.0.1"),
        ("http://chat.localhost", "chat.localhost", "127.0.0.1"),
        ("http://[::1]:8000", "[::1]:8000", "::1"),
        ("http://192.168.1.7:8000", "192.168.1.7:8000", "192.168.1.7"),
        ("https://chat.example", "chat.example", "192.168.1.7"),
    ],
)
def test_pages_of_ours(origin: str, host: str, address: str) -> None:
    assert is_own(origin, host, address)


@pytest.mark.parametrize(
    ("origin", "host", "address"),
    [
        (EVIL, "127.0.0.1:8000", "127.0.0.1"),
        ("http://127.0.0.1:3000", "127.0.0.1:8000", "127.0.0.1"),
        ("http://evil.example:8000", "evil.example:8000", "127.0.0.1"),  # a name of theirs for our address
        ("http://localhost.evil.example", "localhost.evil.example", "::1"),
        ("http://evil.example", "evil.example", "::ffff:127.0.0.1"),
        ("null", "127.0.0.1:8000", "127.0.0.1"),
        ("null", "", ""),
        ("", "", "127.0.0.1"),
        ("file://", "", "127.0.0.1"),
        ("http://[::1", "[::1", "127.0.0.1"),
        ("http://u@127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_pages_of_others(origin: str, host: str, address: str) -> None:
    assert not is_own(origin, host, address)


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        (Settings(), 403),
        (Settings(cors_origins=("https://chat.example",)), 403),
        (Settings(cors_origins=(EVIL,)), 200),
        (Settings(cors_origins=("*",)), 200),
        (Settings(api_keys=("k" * 32,)), 200),  # it does not know the key; whoever does is welcome
    ],
)
async def test_who_may_ask(model_dir: Path, settings: Settings, status: int) -> None:
    group = make_group(model_dir)
    headers = {"origin": EVIL, "authorization": f"Bearer {'k' * 32}"}
    async with client_of(make_app(model_dir, group, settings=settings)) as client:
        response = await client.post("/v1/completions", json=ASK, headers=headers)
        without = await client.post(
            "/v1/completions", json=ASK, headers={"authorization": f"Bearer {'k' * 32}"}
        )
    assert response.status_code == status
    assert without.status_code == 200
    if status == 403:
        error = response.json()["error"]
        assert error["code"] == "foreign_origin"
        assert f"--cors-origin {EVIL}" in error["message"]
        assert len(group.requests) == 1, "the other one"
