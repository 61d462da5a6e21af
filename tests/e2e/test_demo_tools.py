"""The demo model calls a function when one that is listed answers the question, and answers in JSON when
asked to: through the real engine and OpenAI's SDK, with nothing enforced unless a test says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.e2e.server import MODEL, serving

TEMPERATURES = {"Paris": 18, "Lisbon": 24}


def get_weather(city: str) -> dict[str, Any]:
    return {"temperature": TEMPERATURES[city]}


def price_of(product: str) -> dict[str, Any]:
    return {"price": 3 * len(product)}


FUNCTIONS = {"get_weather": get_weather, "price_of": price_of}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {parameter: {"type": "string"}}},
        },
    }
    for name, description, parameter in (
        ("get_weather", "Get the weather.", "city"),
        ("price_of", "What something costs.", "product"),
    )
]
PERSON = "Anna is 31 years old and lives in Rome. Answer in JSON."


class Person(pydantic.BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        serving() as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, temperature=0, **options
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the weather in Paris?", "get_weather says: temperature: 18."),
        ("Is it warm in Lisbon?", "get_weather says: temperature: 24."),
        ("How much are apples?", "price_of says: price: 18."),
    ],
)
def test_a_loop_of_tools_ends_in_an_answer(client: openai.OpenAI, question: str, answer: str) -> None:
    messages: list[Any] = [{"role": "user", "content": question}]
    choice = ask(client, messages).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
    messages += [
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)},
    ]
    last = ask(client, messages).choices[0]
    assert (last.message.content, last.finish_reason) == (answer, "stop")


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS, temperature=0) as stream:
        pieces = [event.arguments_delta for event in stream if event.type.endswith("arguments.delta")]
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert "".join(pieces) == call.function.arguments
    assert len(pieces) > 1


def test_a_question_that_no_function_answers_is_answered(client: openai.OpenAI) -> None:
    choice = ask(client, [{"role": "user", "content": "What is tensor parallelism?"}]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("Tensor parallelism")


def test_it_answers_in_json_when_asked_to(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": PERSON}], temperature=0
    )
    expected = {"name": "Anna", "age": 31, "city": "Rome"}
    assert json.loads(free.choices[0].message.content or "") == expected


def test_what_a_schema_enforces_is_what_it_says_anyway(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": PERSON}], temperature=0, response_format=Person
    )
    assert parsed.choices[0].message.parsed == Person(name="Anna", age=31, city="Rome")
