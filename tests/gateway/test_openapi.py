"""The OpenAPI document: complete, of the form that it says it is of, and true of single fields.

That answers conform to it and requests are taken by it, schemathesis shows (test_schemathesis.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from gateway.errors import ROWS
from gateway.openapi import OPERATIONS, document
from gateway.protocol.capabilities import ENDPOINTS, capabilities
from gateway.settings import Settings
from tests.gateway.serving import client_of, make_app, make_group, make_model_dir

pytestmark = pytest.mark.anyio
KEYS = Settings(api_keys=("first-key",))
DOCUMENT: dict[str, Any] = json.loads(document(("demo", "org/demo"), True))
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def is_valid(name: str, content: object) -> bool:
    """By the component of that name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    return Draft202012Validator(schema).is_valid(content)


def references(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        for key, inner in content.items():
            if key == "$ref":
                yield inner
            else:
                yield from references(inner)
    elif isinstance(content, list):
        for inner in content:
            yield from references(inner)


async def test_it_needs_a_key_and_knows_the_models(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    async with client_of(make_app(model_dir, make_group(model_dir), settings=KEYS)) as client:
        assert (await client.get("/openapi.json")).status_code == 401
        answer = await client.get("/openapi.json", headers={"authorization": "Bearer first-key"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT
    assert SCHEMAS["ChatCompletionRequest"]["properties"]["model"] == {
        "type": "string",
        "enum": ["demo", "org/demo"],
    }


def test_every_route_is_in_it_and_nothing_else(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path)
    app = make_app(model_dir, make_group(model_dir))
    routes = app.openapi()["paths"]  # FastAPI's own, which knows of paths and methods only
    assert {path: item.keys() for path, item in routes.items()} == {
        path: item.keys() for path, item in DOCUMENT["paths"].items()
    }
    assert {one.path: one.request for one in OPERATIONS if one.path in ENDPOINTS} == ENDPOINTS


def test_it_says_which_paths_need_no_key() -> None:
    free = {path for path, item in DOCUMENT["paths"].items() if item.get("get", {}).get("security") == []}
    assert free == {"/livez", "/readyz"}
    assert DOCUMENT["security"] == [{"bearer": []}, {"header": []}]
    assert json.loads(document(("demo",), False))["security"] == []


def test_every_reference_leads_somewhere() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 40
    for target in found:
        part: Any = DOCUMENT
        for step in target.removeprefix("#/").split("/"):
            part = part[step]


def test_every_schema_is_one() -> None:
    for schema in SCHEMAS.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_of_the_table_is_in_it_with_what_becomes_of_it(path: str) -> None:
    fields = SCHEMAS[ENDPOINTS[path].__name__]["properties"]
    table = {one.field: one for one in capabilities().endpoints[path] if "." not in one.field}
    assert fields.keys() == table.keys()
    for name, one in table.items():
        remark = fields[name].get("description", "")
        assert remark == ("" if one.status == "supported" else f"{one.status.capitalize()}: {one.why}")


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"stop": "x"}, True),
        ({"stop": ["x", "y"]}, True),
        ({"stop": [""]}, False),
        ({"logit_bias": {"5": 1}}, True),
        ({"logit_bias": {"five": 1}}, False),
        ({"user": "anybody"}, True),  # ignored
        ({"store": False}, True),  # refused, but for what asks for nothing
        ({"store": True}, False),
        ({"temperature": None}, True),
        ({"temperature": 2.1}, False),
        ({"model": "other"}, False),
        ({"brand_new": 1}, False),
        ({"messages": []}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, False),
    ],
)
def test_a_request_is_described_as_it_is_taken(more: dict[str, object], expected: bool) -> None:
    assert is_valid("ChatCompletionRequest", CHAT | more) is expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", True), (["a"], True), ([1], True), ([[1], [2]], True), ([], False), ([-1], False), ([1.5], False)],
)
def test_prompts_of_all_forms(prompt: object, expected: bool) -> None:
    assert is_valid("CompletionRequest", {"model": "demo", "prompt": prompt}) is expected


def test_responses_name_what_is_always_there() -> None:
    assert SCHEMAS["ChatResponseMessage"]["required"] == ["content", "role", "refusal", "annotations"]
    assert "required" not in SCHEMAS["Delta"] or SCHEMAS["Delta"]["required"] == []
    assert SCHEMAS["ChatCompletion"]["properties"]["object"] == {"type": "string", "const": "chat.completion"}


def test_errors_tell_their_codes() -> None:
    responses = DOCUMENT["components"]["responses"]
    told = {code for response in responses.values() for code in re.findall(r"\w+", response["description"])}
    assert {row.code for row in ROWS if row.code is not None} - told == {"client_gone"}  # which nobody reads
    assert "internal_error" in responses["InternalServerError"]["description"]
    assert "retry-after" in responses["ServiceUnavailable"]["headers"]
    assert set(DOCUMENT["paths"]["/v1/models/{id}"]["get"]["responses"]) >= {"200", "401", "404"}
