"""The table of fields, beside OpenAI's own document (test_protocol.py: its SDK), and what is made from it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from gateway.protocol import capabilities as table
from gateway.protocol.unserved import UNSERVED
from tests.gateway.serving import client_of, make_app, make_group, make_model_dir

ROOT = Path(__file__).parents[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DOCUMENT = json.loads((ROOT / "tests/data/openai_fields.json").read_text())["fields"]


def undecided(path: str, fields: set[str]) -> set[str]:
    """Those that are neither in the table nor inside of what is ignored or refused as a whole."""
    known = {one.field: one.status for one in table.capabilities().endpoints[path]}
    closed = tuple(
        f"{field}{sign}" for field, status in known.items() if status != "supported" for sign in ".["
    )
    return {field for field in fields if field not in known and not field.startswith(closed)}


@pytest.mark.parametrize("path", DOCUMENT)
def test_every_field_of_openais_document_is_decided(path: str) -> None:
    assert len(DOCUMENT[path]) >= (5 if path == "/v1/embeddings" else 20)
    assert undecided(path, set(DOCUMENT[path])) == set()


def test_a_new_field_would_be_noticed() -> None:
    assert undecided(CHAT, {"brand_new", "messages[].brand_new", "audio.voice"}) == {
        "brand_new",
        "messages[].brand_new",
    }


@pytest.mark.parametrize("path", table.ENDPOINTS)
def test_each_field_is_decided_once_and_what_is_not_supported_says_why(path: str) -> None:
    found = table.capabilities().endpoints[path]
    assert len({one.field for one in found}) == len(found)
    assert all(one.why for one in found if one.status != "supported")


def test_the_documents_are_up_to_date() -> None:
    """`python -m gateway.protocol.capabilities` writes them."""
    assert (ROOT / "docs/compatibility.md").read_text() == table.markdown()
    readme = (ROOT / "README.md").read_text()
    assert table.with_summary(readme) == readme


@pytest.mark.anyio
async def test_it_is_served(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    client: httpx.AsyncClient
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        answer = (await client.get("/v1/capabilities")).json()
    assert set(answer["endpoints"]) == set(table.ENDPOINTS)
    audio = next(one for one in answer["endpoints"][CHAT] if one["field"] == "audio")
    assert audio == {"field": "audio", "status": "refused", "why": "the models write text only"}


@pytest.mark.anyio
async def test_an_endpoint_that_is_not_served_says_why(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        assert (await client.get("/v1/capabilities")).json()["unserved"] == UNSERVED
        for path, why in UNSERVED.items():
            for address in (path, f"{path}/some/thing"):
                answer = await client.post(address, json={"model": "demo", "input": "hi"})
                assert answer.status_code == 404
                assert answer.json()["error"]["message"].endswith(
                    f"(POST {address}): it is not served here; {why}"
                )
        rerank = (await client.post("/v1/rerank", json={})).json()["error"]
        assert rerank["code"] == "endpoint_not_served"
        unknown = (await client.post("/v1/rerankx", json={})).json()["error"]
        assert unknown["message"] == "Invalid URL (POST /v1/rerankx)"
    assert not set(UNSERVED) & set(table.ENDPOINTS)
