"""Thoughts over a socket: apart from the content, whole and streamed, counted, switched on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.gateway.chat_models import make_chat_app, make_chat_model, scripted, serving_chat
from tests.gateway.serving import client_of

pytestmark = pytest.mark.anyio
THOUGHT = "The quick brown fox jumps."
TEXT = "Hello world, how are you today?"
SAID = f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}"
ASKED: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), "thinking")


def test_thoughts_are_apart(model_dir: Path) -> None:
    group = scripted(model_dir, SAID)
    num_thoughts = len(group.tokenizer.encode(f"<think>\n{THOUGHT}\n</think>", add_special_tokens=False).ids)
    with (
        serving_chat(model_dir, group) as url,
        OpenAI(base_url=url, api_key="x", max_retries=0, _strict_response_validation=True) as client,
    ):
        whole = client.chat.completions.create(model="demo", messages=ASKED)
        chunks = list(
            client.chat.completions.create(
                model="demo", messages=ASKED, stream=True, stream_options={"include_usage": True}
            )
        )
    message: Any = whole.choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, TEXT)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].model_dump(exclude_unset=True) == {"role": "assistant", "content": None, "refusal": None}
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == num_thoughts
        assert usage.completion_tokens == len(group.says) + 1


async def ask(model_dir: Path, said: str, **fields: Any) -> tuple[Any, str]:
    """The answer's choice, and the prompt."""
    group = scripted(model_dir, said)
    async with client_of(make_chat_app(model_dir, group)) as client:
        body = {"model": "demo", "messages": ASKED} | fields
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json(), group.prompt()


async def test_a_template_may_open_the_thoughts(model_dir: Path) -> None:
    answer, prompt = await ask(
        model_dir, f"{THOUGHT}\n</think>\n\n{TEXT}", chat_template_kwargs={"open_thoughts": True}
    )
    assert prompt.endswith("<think>\n")
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, TEXT)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


async def test_thoughts_that_are_gone_on_with(model_dir: Path) -> None:
    for begun, said, thought in (
        ("Well, ", TEXT, None),
        ("<think>\nHm, ", f"{THOUGHT}\n</think>\n{TEXT}", THOUGHT),
    ):
        messages = [*ASKED, {"role": "assistant", "content": begun}]
        answer, prompt = await ask(model_dir, said, messages=messages, continue_final_message=True)
        assert prompt.endswith(begun)
        message = answer["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, TEXT)


async def test_no_thinking_is_no_thoughts(model_dir: Path) -> None:
    answer, prompt = await ask(model_dir, TEXT, reasoning_effort="none")
    assert prompt.endswith("</think>\n\n")
    assert "reasoning_content" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    for effort in ("low", "high"):
        _, prompt = await ask(model_dir, SAID, reasoning_effort=effort)
        assert prompt.endswith("<|assistant|>\n")


async def test_thoughts_that_never_end(model_dir: Path) -> None:
    answer, _ = await ask(model_dir, SAID, max_tokens=4)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert THOUGHT.startswith(choice["message"]["reasoning_content"])
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4


async def test_earlier_thoughts_go_to_the_template(model_dir: Path) -> None:
    earlier = [*ASKED, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, *ASKED]
    _, prompt = await ask(model_dir, TEXT, messages=earlier)
    assert "<think>\nHm.\n</think>\n\nYes.<|end|>" in prompt


async def test_a_mark_that_is_spelled_out_is_text(model_dir: Path) -> None:
    """To this model the tags are tokens. Their text, token by token, is a quotation."""
    group = scripted(model_dir)
    quoted = [id for part in ("<thi", "nk>", " hello </thi", "nk> ", TEXT) for id in _ids(group, part)]

    async def generate(request: Any, take: Any = None) -> Any:
        group.says = quoted
        async for batch in super(type(group), group).generate(request):
            yield batch

    group.generate = generate  # type: ignore[method-assign]
    async with client_of(make_chat_app(model_dir, group)) as client:
        response = await client.post("/v1/chat/completions", json={"model": "demo", "messages": ASKED})
    message = response.json()["choices"][0]["message"]
    assert message["content"] == f"<think> hello </think> {TEXT}"
    assert "reasoning_content" not in message


def _ids(group: Any, text: str) -> list[int]:
    ids: list[int] = group.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


async def test_structured_output_comes_behind_thoughts(model_dir: Path) -> None:
    group = scripted(model_dir, TEXT)
    async with client_of(make_chat_app(model_dir, group)) as client:
        for fields in ({}, {"response_format": {"type": "json_object"}}):
            body = {"model": "demo", "messages": ASKED} | fields
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    free, shaped = (request.grammar for request in group.requests)
    assert not free
    assert "thoughts" in shaped
    assert "json_schema" in shaped
