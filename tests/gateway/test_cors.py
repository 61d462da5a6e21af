"""Pages of other origins: only those that the settings name, errors and preflights included."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.gateway.serving import client_of, make_app, make_group

pytestmark = pytest.mark.anyio
PAGE, OTHER = "https://chat.example", "https://other.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def allowed(model_dir: Path, settings: Settings, origin: str) -> list[tuple[int, str | None]]:
    """Status and allowed origin of a preflight, an answer, a refusal and a malformed request."""
    key = {"authorization": "Bearer secret"}
    async with client_of(make_app(model_dir, make_group(model_dir), settings=settings)) as client:
        responses = [
            await client.options("/v1/chat/completions", headers={"origin": origin, **PREFLIGHT}),
            await client.get("/v1/models", headers={"origin": origin, **key}),
            await client.get("/v1/models", headers={"origin": origin}),
            await client.post("/v1/completions", headers={"origin": origin, **key}, content=b"{"),
        ]
    return [(one.status_code, one.headers.get("access-control-allow-origin")) for one in responses]


async def test_a_named_origin_may_ask(model_dir: Path) -> None:
    settings = Settings(api_keys=("secret",), cors_origins=(PAGE,))
    assert await allowed(model_dir, settings, PAGE) == [
        (200, PAGE),
        (200, PAGE),
        (401, PAGE),
        (400, PAGE),
    ]
    assert await allowed(model_dir, settings, OTHER) == [
        (400, None),
        (200, None),
        (401, None),
        (400, None),
    ]


async def test_without_a_setting_nobody_may(model_dir: Path) -> None:
    found = await allowed(model_dir, Settings(api_keys=("secret",)), PAGE)
    assert found == [(401, None), (200, None), (401, None), (400, None)]


async def test_a_page_may_delete_what_it_stored(model_dir: Path) -> None:
    settings = Settings(cors_origins=(PAGE,))
    headers = {"origin": PAGE, **PREFLIGHT, "access-control-request-method": "DELETE"}
    async with client_of(make_app(model_dir, make_group(model_dir), settings=settings)) as client:
        answer = await client.options("/v1/responses/resp_1", headers=headers)
        assert answer.status_code == 200
        gone = await client.delete("/v1/responses/resp_1", headers={"origin": PAGE})
    assert (gone.status_code, gone.headers["access-control-allow-origin"]) == (404, PAGE)
