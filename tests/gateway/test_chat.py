"""The terminal chat against an API that answers in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from typer.testing import CliRunner

from gateway import api_client, cli
from gateway.api_client import ServerError, base_url, choose_model
from gateway.chat import Conversation, talk


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
        num_failed = talk(conversation, ask, shown.append, shown.append)
    assert num_failed == sum(text.startswith("\nerror: ") for text in shown)
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


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_question_that_was_piped_in_and_failed_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    models = httpx.Response(200, json={"data": [{"id": "a"}]})
    answer = sse(delta("fine")) if status == 200 else httpx.Response(status, text="not ready")
    client = FakeAPI(models, answer).client()
    monkeypatch.setattr(api_client, "connect", lambda url, api_key: client)
    result = CliRunner().invoke(cli.app, ["chat"], input="hi\n")
    assert result.exit_code == code, result.output
    assert result.stdout == ("fine\n" if code == 0 else "")
    assert ("not ready" in result.stderr) == (code == 1)


def listing(*names: str) -> FakeAPI:
    return FakeAPI(httpx.Response(200, json={"data": [{"id": name} for name in names]}))


def test_the_first_model_is_the_default_and_another_must_be_listed() -> None:
    with listing("a", "b").client() as client:
        assert choose_model(client, None) == "a"
    with listing("a", "b").client() as client:
        assert choose_model(client, "b") == "b"
    with listing("a", "b").client() as client, pytest.raises(ServerError, match=r"no model 'c' .* a, b"):
        choose_model(client, "c")
    with listing().client() as client, pytest.raises(ServerError, match="--model"):
        choose_model(client, None)


def test_a_server_that_lists_no_models_is_believed_to_have_the_one_asked_for() -> None:
    with FakeAPI(httpx.Response(404)).client() as client:
        assert choose_model(client, "c") == "c"
    refused = httpx.Response(401, json={"error": {"message": "Incorrect API key"}})
    with FakeAPI(refused).client() as client, pytest.raises(ServerError, match="Incorrect API key"):
        choose_model(client, "c")


def test_an_address_may_lack_its_scheme() -> None:
    for url in ("127.0.0.1:8200", "http://127.0.0.1:8200/", "http://127.0.0.1:8200/v1"):
        assert base_url(url) == "http://127.0.0.1:8200"
    with pytest.raises(ServerError, match="ftp://x is not an http"):
        base_url("ftp://x")
