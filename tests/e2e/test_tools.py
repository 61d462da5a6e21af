"""Calls that are enforced, in the real engine: the demo model calls what it was told to, fit or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gateway.model_source import demo_directory
from tests.e2e.server import MODEL, Server, serving
from tests.gateway.chat_models import HERMES

ASKED: list[Any] = [{"role": "user", "content": "What is Sluice?"}]
COLOURS = ["red", "green", "blue"]
PAINT = {
    "name": "paint",
    "description": "Paints a wall.",
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": COLOURS}, "coats": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["colour", "coats"],
        "additionalProperties": False,
    },
}
STOP = {"name": "stop"}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (PAINT, STOP)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The demo model behind a template of Hermes's kind."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "hermes.jinja").write_text(HERMES)
    file = directory / "model-config.yaml"
    settings = {
        "modelName": MODEL,
        "deviceType": "cpu",
        "handler": {"model_path": str(demo_directory())},
        "chatTemplate": str(directory / "hermes.jinja"),
    }
    file.write_text(json.dumps(settings))
    with serving(str(file)) as server, _client(server) as client:
        yield client


def _client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def _check(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "stop":
        assert arguments == {}
    else:
        assert call.function.name == "paint"
        assert set(arguments) == {"colour", "coats"}
        assert arguments["colour"] in COLOURS
        assert arguments["coats"] in (1, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}], ids=["required", "named"]
)
def test_a_call_that_is_asked_for_is_made(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        n=8,
        temperature=2.0,
        max_tokens=200,
    )
    for made in answer.choices:
        assert made.finish_reason == "tool_calls"
        assert made.message.content is None
        assert made.message.tool_calls is not None
        [call] = made.message.tool_calls
        _check(call)
    names = {made.message.tool_calls[0].function.name for made in answer.choices if made.message.tool_calls}
    assert names == {"paint"} or choice == "required"


@pytest.mark.slow
def test_a_streamed_call_and_its_result(client: openai.OpenAI) -> None:
    messages = list(ASKED)
    with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    _check(message.tool_calls[0])
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"}
    free = client.chat.completions.create(
        model=MODEL, messages=[*messages, message, result], tools=TOOLS, max_tokens=16
    )
    assert free.choices[0].finish_reason in ("stop", "length")
