"""Functions in POST /v1/responses over a socket, by OpenAI's own client: loops, streams, what is enforced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import FunctionToolParam
from pydantic import BaseModel

from tests.gateway.chat_models import make_chat_model, scripted, serving_chat
from tests.gateway.test_responses import events_of, kinds_of, sdk

WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}
NOW: FunctionToolParam = {"type": "function", "name": "now", "parameters": None, "strict": None}
QUESTION: dict[str, Any] = {"role": "user", "content": "How is the weather in Oslo?"}
OSLO = '{"city": "Oslo"}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), "hermes")


def call_of(response: Any) -> Any:
    [call] = [item for item in response.output if item.type == "function_call"]
    return call


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tool_loop(model: Path, is_stored: bool) -> None:
    """With the items sent again, and with the id of the response that has the call: the prompts are equal."""
    group = scripted(model, CALL, "It is sunny.")
    with serving_chat(model, group) as url, sdk(url) as client:
        first = client.responses.create(model="demo", input=[QUESTION], tools=[WEATHER])  # type: ignore[list-item]
        assert first.status == "completed"
        call = call_of(first)
        assert (call.name, call.arguments, call.status) == ("get_weather", OSLO, "completed")
        assert call.call_id.startswith("call_")
        assert call.id.startswith("fc_")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "clear"}'}
        more: Any = (
            {"input": [result], "previous_response_id": first.id}
            if is_stored
            else {"input": [QUESTION, *first.output, result]}
        )
        second = client.responses.create(model="demo", tools=[WEATHER], **more)
    assert second.output_text == "It is sunny."
    assert second.tools[0].type == "function"
    assert second.tools[0].name == "get_weather"
    prompt = group.prompt()
    question, _, rest = prompt.partition("<|user|>\nHow is the weather in Oslo?<|end|>")
    assert '"name": "get_weather"' in question
    assert rest == (
        f"<|assistant|>\n{CALL}<|end|><|user|>\n"
        '<tool_response>\n{"sky": "clear"}\n</tool_response><|end|><|assistant|>\n'
    )


def test_a_stream_of_text_and_calls(model: Path) -> None:
    group = scripted(model, f"I look. {CALL}\n{SECOND}")
    with serving_chat(model, group) as url:
        events = events_of(url, input=[QUESTION], tools=[WEATHER, NOW])
    message = [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
    ]
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    expected = ["created", "in_progress", *message, "output_item.done", *call, *call, "completed"]
    assert kinds_of(events) == expected
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    by_item = {
        index: "".join(one["delta"] for one in deltas if one["output_index"] == index) for index in (1, 2)
    }
    assert by_item == {1: OSLO, 2: "{}"}
    assert len(deltas) > 3, "as the model writes them"
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert [item.get("arguments") for item in output] == [None, OSLO, "{}"]
    assert output[0]["content"][0]["text"] == "I look."
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


def test_the_sdk_s_helpers(model: Path) -> None:
    """`stream` and `parse` read the arguments, and a strict function is enforced."""
    tool: Any = openai.pydantic_function_tool(GetWeather, name="get_weather")
    tool = {"type": "function", **tool["function"]}
    group = scripted(model, CALL)
    with serving_chat(model, group) as url, sdk(url) as client:
        parsed = client.responses.parse(model="demo", input=[QUESTION], tools=[tool])  # type: ignore[list-item]
        with client.responses.stream(model="demo", input=[QUESTION], tools=[tool]) as stream:  # type: ignore[list-item]
            snapshots = [
                event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"
            ]
            streamed = stream.get_final_response()
        assert snapshots[-1] == OSLO
        for response in (parsed, streamed):
            assert json.loads(call_of(response).arguments) == {"city": "Oslo"}
        sent_again: Any = [
            QUESTION,
            *parsed.output,
            {"type": "function_call_output", "call_id": call_of(parsed).call_id, "output": []},
        ]
        client.responses.create(model="demo", input=sent_again, tools=[tool])
    assert [bool(request.grammar) for request in group.requests] == [True, True, True]


ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
ENFORCED: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({"tool_choice": "auto"}, False),
    ({"tool_choice": "none"}, False),
    ({"tool_choice": "required"}, True),
    ({"tool_choice": {"type": "function", "name": "now"}}, True),
    ({"tool_choice": ALLOWED}, True),
    ({"parallel_tool_calls": False}, True),
    ({"parallel_tool_calls": False, "tools": []}, False),
    ({"tools": [{**WEATHER, "strict": True}]}, True),
]


@pytest.fixture(scope="module")
def asked(model: Path) -> Iterator[tuple[OpenAI, Any]]:
    group = scripted(model, "Hi.")
    with serving_chat(model, group) as url, sdk(url) as client:
        yield client, group


@pytest.mark.parametrize(("fields", "is_enforced"), ENFORCED)
def test_what_is_enforced_has_a_grammar(
    asked: tuple[OpenAI, Any], fields: dict[str, Any], is_enforced: bool
) -> None:
    client, group = asked
    given: Any = {"tools": [WEATHER, NOW]} | fields
    response = client.responses.create(model="demo", input=[QUESTION], **given)  # type: ignore[list-item]
    assert bool(group.requests[-1].grammar) == is_enforced
    is_told = fields.get("tool_choice") != "none" and fields.get("tools") != []
    assert ("get_weather" in group.prompt()) == is_told
    choice: Any = response.tool_choice
    echoed = choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True)
    assert echoed == fields.get("tool_choice", "auto")


def call(id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "now", "arguments": "{}"}


def result(id: str) -> dict[str, Any]:
    output = [{"type": "input_text", "text": f"noon {id}"}]
    return {"type": "function_call_output", "call_id": id, "output": output}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TOLD_C1, TOLD_C2 = (f"<tool_response>\nnoon {id}\n</tool_response>" for id in ("c1", "c2"))
LOOPS: list[tuple[list[dict[str, Any]], str]] = [
    (  # parallel
        [call("c1"), call("c2"), result("c1"), result("c2")],
        f"<|assistant|>\n{SECOND}{SECOND}<|end|><|user|>\n{TOLD_C1}<|end|><|user|>\n{TOLD_C2}<|end|>",
    ),
    (  # one after another
        [call("c1"), result("c1"), call("c2"), result("c2")],
        f"<|assistant|>\n{SECOND}<|end|><|user|>\n{TOLD_C1}<|end|>"
        f"<|assistant|>\n{SECOND}<|end|><|user|>\n{TOLD_C2}<|end|>",
    ),
    (  # text before a call and behind it belongs to its message
        [
            said("A"),
            call("c1"),
            said("B"),
            result("c1"),
        ],
        f"<|assistant|>\nA\nB{SECOND}<|end|><|user|>\n{TOLD_C1}<|end|>",
    ),
]


@pytest.mark.parametrize(("items", "prompt"), LOOPS)
def test_calls_and_results_in_any_order_that_has_a_meaning(
    asked: tuple[OpenAI, Any], items: list[dict[str, Any]], prompt: str
) -> None:
    client, group = asked
    client.responses.create(model="demo", input=[QUESTION, *items], tools=[NOW])  # type: ignore[list-item]
    _, _, rest = group.prompt().partition("in Oslo?<|end|>")
    assert rest == f"{prompt}<|assistant|>\n"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([call("c1"), call("c2"), result("c1")], "No tool output found for function call c2."),
        ([call("c1"), QUESTION, result("c1")], "No tool output found for function call c1."),
        ([call("c1"), result("c1"), result("c1")], "No tool call found for function call output"),
        ([call("c1"), call("c2"), result("c2"), said("A")], "function call c1."),
    ],
)
def test_calls_without_results_and_results_without_calls(
    asked: tuple[OpenAI, Any], items: list[dict[str, Any]], message: str
) -> None:
    client, _ = asked
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.responses.create(model="demo", input=[QUESTION, *items], tools=[NOW])  # type: ignore[list-item]
    assert caught.value.param == "input"
