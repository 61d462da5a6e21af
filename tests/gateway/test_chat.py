"""The terminal chat against an API that answers in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from gateway.chat import ChatError, Conversation, first_model, talk


def sse(*events: object, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text=": ping\n\n" + "".join(lines))


def delta(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


class FakeAPI:
    """Gives the next of its answers, and remembers what was asked."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, object]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content or b"{}"))
        return self.answers.pop(0)

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://api.invalid")


def chat(api: FakeAPI, *lines: str) -> tuple[Conversation, str]:
    """Type the lines, then Ctrl-D. Returns the conversation and what was shown."""
    pending: Iterator[str] = iter(lines)
    shown: list[str] = []

    def ask() -> str:
        try:
            return next(pending)
        except StopIteration:
            raise EOFError from None

    with api.client() as client:
        conversation = Conversation(client, "m")
        talk(conversation, ask, shown.append)
    return conversation, "".join(shown)


def test_the_conversation_is_sent_again_with_each_question() -> None:
    api = FakeAPI(sse(delta("Hel"), delta("lo")), sse(delta("Fine")))
    conversation, shown = chat(api, "hi", "", "how are you?")
    assert shown == "Hello\nFine\n"
    assert api.bodies[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "how are you?"},
    ]
    assert len(conversation.messages) == 4


def test_commands() -> None:
    api = FakeAPI(sse(delta("a")), sse(delta("b")))
    _, shown = chat(api, "hi", "/clear", "/system Be brief.", "again", "/help", "/exit", "never sent")
    assert api.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "again"},
    ]
    assert len(api.bodies) == 2
    assert "/exit" in shown


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (sse(delta("half"), {"error": {"message": "the workers died"}}, done=False), "the workers died"),
        (sse(delta("half"), done=False), "broke off"),
        (httpx.Response(503, json={"error": {"message": "not ready"}}), "not ready (HTTP 503)"),
        (httpx.Response(502, text="<html>"), "HTTP 502"),
    ],
)
def test_an_answer_that_failed_is_said_and_not_remembered(answer: httpx.Response, reason: str) -> None:
    conversation, shown = chat(FakeAPI(answer), "hi")
    assert reason in shown
    assert conversation.messages == []


def test_the_first_model_is_the_default() -> None:
    listing = httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]})
    with FakeAPI(listing).client() as client:
        assert first_model(client) == "a"
    with FakeAPI(httpx.Response(200, json={"data": []})).client() as client, pytest.raises(ChatError):
        first_model(client)
