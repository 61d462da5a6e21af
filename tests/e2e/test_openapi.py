"""schemathesis over the OpenAPI document, briefly (tests/soak/schemathesis_bodies.py: 20,000 bodies); and
that it would notice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.server import Server
from tests.soak.schemathesis_bodies import Run, documented

NUM_BODIES = 216


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, dict[str, Any]]]:
    with documented() as (server, document):
        yield server, document
        assert server.complete().status_code == 200


def test_answers_are_what_the_document_says(served: tuple[Server, dict[str, Any]]) -> None:
    server, document = served
    worker = server.workers()[0].pid
    seen = Run(server.url, copy.deepcopy(document)).all(NUM_BODIES, 3)
    assert seen.problems == []
    assert seen.num_bodies >= NUM_BODIES
    assert not [status for status in seen.statuses if status >= 500]
    assert seen.statuses[200] >= 50
    assert seen.by_operation["POST /v1/chat/completions"][200] >= 1
    assert server.workers()[0].pid == worker


def _other_body(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["Detokenized"]["required"].append("brand_new")


def _other_field(document: dict[str, Any]) -> None:
    del document["components"]["schemas"]["ModelList"]["properties"]["object"]
    document["components"]["schemas"]["ModelList"]["required"] = ["data"]


def _other_status(document: dict[str, Any]) -> None:
    del document["paths"]["/detokenize"]["post"]["responses"]["400"]


def _other_type(document: dict[str, Any]) -> None:
    responses = document["paths"]["/metrics"]["get"]["responses"]
    responses["200"]["content"] = {"application/json": {}}


def _other_key(document: dict[str, Any]) -> None:
    del document["paths"]["/livez"]["get"]["security"]


def _other_events(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["ChatChunk"]["required"].append("brand_new")
    request = document["components"]["schemas"]["ChatCompletionRequest"]
    request["properties"] = {name: request["properties"][name] for name in ("model", "messages", "stream")}
    request["properties"]["stream"] = {"const": True}
    request["properties"]["messages"] = {"const": [{"role": "user", "content": "hi"}]}
    request["required"].append("stream")


def _other_request(document: dict[str, Any]) -> None:
    request = document["components"]["schemas"]["TokenizeRequest"]
    request["properties"] = {"prompt": {"type": "string", "enum": ["this"]}}
    request["required"] = ["prompt"]


@pytest.mark.parametrize(
    ("path", "change", "noticed"),
    [
        ("/detokenize", _other_body, "JsonSchemaError"),
        ("/v1/models", _other_field, "JsonSchemaError"),
        ("/detokenize", _other_status, "UndefinedStatusCode"),
        ("/metrics", _other_type, "UndefinedContentType"),
        ("/livez", _other_key, "IgnoredAuth"),
        ("/v1/chat/completions", _other_events, "JsonSchemaError"),
        ("/tokenize", _other_request, "AcceptedNegativeData"),
    ],
)
def test_an_untrue_document_would_be_noticed(
    served: tuple[Server, dict[str, Any]],
    path: str,
    change: Callable[[dict[str, Any]], None],
    noticed: str,
) -> None:
    server, document = served
    untrue = copy.deepcopy(document)
    change(untrue)
    untrue["paths"] = {path: untrue["paths"][path]}
    seen = Run(server.url, untrue).all(60, 2)
    assert noticed in {problem.split(": ")[1] for problem in seen.problems}
