"""Roles, parts and their rules; going on with a message; templates' variables; where a key's requests go."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.router import pick
from tests.gateway.chat_models import make_chat_app, make_chat_model, scripted
from tests.gateway.serving import client_of, make_group, make_served

pytestmark = pytest.mark.anyio
USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "noon"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), "hermes")


async def ask(model_dir: Path, text: str = "Hello.", **fields: Any) -> tuple[dict[str, Any], str]:
    """The response and the prompt, if there was one."""
    group = scripted(model_dir, text)
    async with client_of(make_chat_app(model_dir, group)) as client:
        response = await client.post(
            "/v1/chat/completions", json={"model": "demo", "messages": [USER], **fields}
        )
    assert response.status_code in (200, 400)
    return response.json(), group.prompt() if group.requests else ""


ALLOWED: list[list[dict[str, Any]]] = [
    [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, USER],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Ann",
        }
    ],
    [USER, {"role": "assistant", "content": "a", "refusal": None, "audio": None, "annotations": []}, USER],
    [USER, {"role": "assistant", "refusal": "No."}, USER],
    [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
    [USER, CALLING, RESULT],
    [USER, CALLING, RESULT, RESULT],
    [USER, CALLING, {**RESULT, "content": [{"type": "text", "text": "noon"}]}, USER],
    [USER, {**CALLING, "tool_calls": [CALL, {**CALL, "id": "b"}]}, {**RESULT, "tool_call_id": "b"}, RESULT],
    [USER, {"role": "assistant", "function_call": {"name": "now", "arguments": "{}"}}, USER],
    [USER, {"role": "function", "name": "now", "content": None}],
]


@pytest.mark.parametrize("messages", ALLOWED)
async def test_conversations_that_are_served(model_dir: Path, messages: list[dict[str, Any]]) -> None:
    answer, prompt = await ask(model_dir, messages=messages)
    assert "choices" in answer, answer
    assert prompt


REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    ([{"role": "robot", "content": "a"}], "messages[0].role", "'user'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content",
     "'image_url'"),
    ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "messages[0].content[0].type",
     "'user'"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "Missing"),
    ([{"role": "user"}], "messages[0].content", "Missing"),
    ([{"role": "user", "content": "a", "tool_calls": [CALL]}], "messages[0].tool_calls", "'user'"),
    ([{"role": "user", "content": "a", "tool_call_id": "x"}], "messages[0].tool_call_id", "'user'"),
    ([USER, {"role": "assistant"}], "messages[1].content", "Missing"),
    ([USER, {"role": "assistant", "tool_calls": []}], "messages[1].content", "Missing"),
    ([USER, {"role": "tool", "content": "x"}], "messages[1].tool_call_id", "Missing"),
    ([USER, {"role": "function", "content": "x"}], "messages[1].name", "Missing"),
    ([USER, RESULT], "messages[1].role", "preceding message with 'tool_calls'"),
    ([USER, CALLING, {**RESULT, "tool_call_id": "other"}], "messages[2].role", "preceding"),
    ([USER, CALLING, RESULT, USER, RESULT], "messages[4].role", "preceding"),
    ([USER, CALLING], "messages", "call_1"),
    ([USER, CALLING, USER], "messages", "call_1"),
    ([USER, {**CALLING, "tool_calls": [{**CALL, "type": "custom"}]}], "messages[1].tool_calls[0].type",
     "'function'"),
    ([USER, {**CALLING, "tool_calls": [{"id": "a", "type": "function"}]}],
     "messages[1].tool_calls[0].function", ""),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param", "message"), REFUSED)
async def test_conversations_that_cannot_be(
    model_dir: Path, messages: list[dict[str, Any]], param: str, message: str
) -> None:
    answer, _ = await ask(model_dir, messages=messages)
    assert answer["error"]["param"] == param
    assert message in answer["error"]["message"]


async def test_going_on_with_the_last_message(model_dir: Path) -> None:
    """The prompt ends where the message does, and the answer keeps the space before its first word."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)
    for begun in ("Hello world,", "Hello world, ", "One\n"):
        messages = [USER, {"role": "assistant", "content": begun}]
        answer, prompt = await ask(model_dir, " how are you", messages=messages, continue_final_message=True)
        assert prompt == reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert prompt.endswith(begun)
        assert answer["choices"][0]["message"]["content"] == " how are you"
    _, prompt = await ask(model_dir, add_generation_prompt=False)
    assert prompt.endswith("hi<|end|>")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"nothing_of_mine": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"a{n}": 1 for n in range(33)}}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"prompt_cache_key": "x" * 2_000}, "prompt_cache_key"),
        ({"store": True}, "store"),
        ({"verbosity": "high"}, "verbosity"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
    ],
)
async def test_what_is_refused(model_dir: Path, fields: dict[str, Any], param: str) -> None:
    answer, prompt = await ask(model_dir, **fields)
    assert answer["error"]["param"] == param
    assert not prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}},
        {"service_tier": "flex"},
        {"prediction": {"type": "content", "content": "x"}},
        {"store": False},
        {"verbosity": "medium"},
        {"modalities": ["text"]},
        {"reasoning_effort": "none"},
        {"parallel_tool_calls": True},
        {"tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
        {"chat_template_kwargs": {}},
        {"prompt_cache_key": "ü"},
    ],
)
async def test_what_changes_nothing(model_dir: Path, fields: dict[str, Any]) -> None:
    _, plain = await ask(model_dir)
    answer, prompt = await ask(model_dir, **fields)
    assert "choices" in answer, answer
    assert prompt == plain


def test_a_cache_key_has_a_group_of_its_own_while_that_is_not_busy(model_dir: Path) -> None:
    groups = [make_group(model_dir, name=f"fake/{number}") for number in range(3)]
    model = make_served(model_dir, *groups)
    keys = [f"key {number}" for number in range(300)]
    chosen = {key: pick(model, {}, 1, cache_key=key) for key in keys}
    assert all(pick(model, {}, 1, cache_key=key) is chosen[key] for key in keys)
    assert all(50 < count < 150 for count in Counter(group.name for group in chosen.values()).values())
    most_ahead = groups[0].info.max_num_seqs // 8
    warm = chosen["key 0"]
    warm.num_outstanding = most_ahead
    assert pick(model, {}, 1, cache_key="key 0") is warm
    warm.num_outstanding = most_ahead + 1
    assert pick(model, {}, 1, cache_key="key 0") is not warm
    warm.num_outstanding = 0
    fewer = make_served(model_dir, *(group for group in groups if group is not warm))
    for key in keys:
        if chosen[key] is not warm:
            assert pick(fewer, {}, 1, cache_key=key) is chosen[key], "a group that goes moves no other's keys"


async def test_requests_with_one_key_go_to_one_group(model_dir: Path) -> None:
    groups = [scripted(model_dir, "Hello.", name=f"fake/{number}") for number in range(4)]
    async with client_of(make_chat_app(model_dir, *groups)) as client:
        for number in range(12):
            body = {"model": "demo", "messages": [USER], "prompt_cache_key": f"k{number % 3}"}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    counts = [len(group.requests) for group in groups]
    assert sum(counts) == 12
    assert all(count % 4 == 0 for count in counts)


async def test_large_conversations_are_bounded(model_dir: Path) -> None:
    """Many strings, many keys: guarded and rendered, or refused; never a 5xx."""
    properties = {f"p{number}": {"type": "string", "description": "<|end|>"} for number in range(2_000)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    answer, _ = await ask(model_dir, tools=[tool])
    assert answer["error"]["code"] == "context_length_exceeded"
    nested: Any = "x"
    for _ in range(50):
        nested = {"a": nested}
    arguments = json.dumps(nested)
    call = {**CALL, "function": {"name": "now", "arguments": arguments}}
    answer, prompt = await ask(model_dir, messages=[USER, {**CALLING, "tool_calls": [call]}, RESULT])
    assert arguments in prompt
