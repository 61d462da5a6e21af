"""The layers around the application: keys, request ids, the limit on bodies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.gateway.serving import client_of, make_app, make_group, make_model_dir

pytestmark = pytest.mark.anyio
KEYS = Settings(api_keys=("first-key", "schlüssel"))
BODY = {"model": "demo", "prompt": "hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/chat/completions",
        "/metrics",
        "/health",
        "/nope",
        "/",
        "//livez",
        "/livez/",
        "/LIVEZ",
        "/livez/../v1/models",
        "/livez%2f",
        "/livez;x",
        "/readyz/x",
        "/v1//models",
        "/openapi.json",
        "/docs",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "BREW"])
async def test_without_a_key_every_path_is_closed(model_dir: Path, path: str, method: str) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir), settings=KEYS)) as client:
        request = client.build_request(
            method, "http://test/x", headers={"host": "livez", "x-original-url": "/livez"}
        )
        request.url = request.url.copy_with(raw_path=path.encode())
        response = await client.send(request)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    if method == "HEAD":
        return
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


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
