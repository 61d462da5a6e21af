"""Answers of a given form from the real server and the demo model, by OpenAI's SDK over a socket."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from gateway.model_source import demo_directory
from tests.e2e.server import MODEL, Server

TOKENIZER = Tokenizer.from_file(str(demo_directory() / "tokenizer.json"))
CLOSING = [id for token in ('"', "}", "]", '"}') if (id := TOKENIZER.token_to_id(token)) is not None]
"""Tokens that end strings, lists and objects: a model that was not taught JSON rarely does."""

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is tensor parallelism?"}]


class Step(BaseModel):
    explanation: str = Field(max_length=20)
    cost: int = Field(ge=0, le=1000)


class Answer(BaseModel):
    verdict: Literal["yes", "no", "perhaps"]
    confidence: float | None
    steps: list[Step] = Field(min_length=1, max_length=2)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, temperature: float = 1.0, seed: int = 1, **more: object) -> str:
    """The text of a raw completion that ended by itself."""
    response = client.completions.create(
        model=MODEL, prompt="Sluice", max_tokens=200, temperature=temperature, seed=seed, extra_body=more
    )
    assert response.choices[0].finish_reason == "stop"
    return response.choices[0].text


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_parse(client: openai.OpenAI, temperature: float) -> None:
    response = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,
        response_format=Answer,
        temperature=temperature,
        n=4,
        seed=4,  # a number may go on for ever: with this seed none does
        max_tokens=500,
    )
    for choice in response.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)
        assert choice.message.content is not None
        assert list(json.loads(choice.message.content)) == ["verdict", "confidence", "steps"]
    assert len({choice.message.content for choice in response.choices}) == (1 if temperature == 0 else 4)


def test_stream_helper_parses_as_it_reads(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, response_format=Answer, temperature=1, seed=5, max_tokens=500
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_what_is_cut_is_said_to_be(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Answer, max_tokens=5)


def test_json(client: openai.OpenAI) -> None:
    properties = {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, None, "x"]}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    for seed in range(3):
        text = complete(client, 2, seed, guided_json=schema)
        Draft202012Validator(schema).validate(json.loads(text))


def test_json_object(client: openai.OpenAI) -> None:
    for seed in range(5):
        response = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            response_format={"type": "json_object"},
            temperature=0.7,
            seed=seed,
            max_tokens=400,
            logit_bias={str(id): 20 for id in CLOSING},
        )
        choice = response.choices[0]
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_regex_choice_and_grammar(client: openai.OpenAI) -> None:
    for temperature in (0, 1, 2):
        text = complete(client, temperature, structured_outputs={"regex": r"[A-Z][a-z]{2,8} \d{3}"})
        assert re.fullmatch(r"[A-Z][a-z]{2,8} \d{3}", text)
        choices = ["yes", "no", "I don't know", "数 €"]
        assert complete(client, temperature, structured_outputs={"choice": choices}) in choices
        assert complete(client, temperature, guided_choice=choices[3:]) == "数 €"
        lark = 'start: "(" NUMBER ("," NUMBER){0,3} ")"\nNUMBER: /[0-9]{1,3}/'
        text = complete(client, temperature, guided_grammar=lark)
        assert re.fullmatch(r"\([0-9]{1,3}(,[0-9]{1,3}){0,3}\)", text)


def test_free_and_constrained_answers_at_once(client: openai.OpenAI) -> None:
    """Free answers are to the letter what they are alone."""

    def free(seed: int) -> str:
        response = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=1, seed=seed, max_tokens=40
        )
        return response.choices[0].message.content or ""

    alone = [free(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        bound = [pool.submit(complete, client, 1, seed, guided_regex="[a-f]{30,60}") for seed in range(4)]
        together = list(pool.map(free, range(4)))
    assert together == alone
    assert all(re.fullmatch("[a-f]{30,60}", each.result()) for each in bound)


def test_an_impossible_schema_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="'uniqueItems', at '#/properties/a'") as refused:
        client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=wanted)  # type: ignore[call-overload]
    assert refused.value.param == "response_format.json_schema.schema"


def test_a_control_token_that_is_not_the_models_is_refused(client: openai.OpenAI) -> None:
    """Only the engine knows the tokens: its refusal is a 400, too."""
    with pytest.raises(openai.BadRequestError, match="unknown special token"):
        complete(client, guided_grammar='start: "a" <|no_such_token|>')
