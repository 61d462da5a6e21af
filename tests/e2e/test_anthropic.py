"""Anthropic's own SDK against the real server: what it is told is what OpenAI's endpoint tells."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from anthropic import Anthropic

from tests.e2e.server import MODEL, Server

QUESTIONS = ["What is Sluice?", "What is tensor parallelism?", "What is 3 + 4?", "Hello!"]


@pytest.fixture(scope="module")
def client(server: Server) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, _strict_response_validation=True)


@pytest.mark.parametrize("question", QUESTIONS)
def test_messages_whole_and_streamed_are_those_of_a_chat(
    server: Server, client: Anthropic, question: str
) -> None:
    messages = [{"role": "user", "content": question}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 48}
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 48, "messages": messages}
    greedy = {"temperature": 0}
    whole = client.messages.create(**asked, extra_body=greedy)
    with client.messages.stream(**asked, extra_body=greedy) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        [block] = message.content
        assert block.type == "text"
        assert block.text == chat["choices"][0]["message"]["content"]
        assert message.stop_reason == "end_turn"
        usage = message.usage
        num_prompt = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert num_prompt == chat["usage"]["prompt_tokens"]
        assert usage.output_tokens == chat["usage"]["completion_tokens"]
    counted = client.messages.count_tokens(model=MODEL, messages=asked["messages"])
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]
