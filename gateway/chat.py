"""A chat in the terminal over the HTTP API: `sluice chat`. Works with any OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx

HELP = "/clear forgets the conversation, /system TEXT sets the instructions, /exit or Ctrl-D leaves."

Ask = Callable[[], str]
Say = Callable[[str], None]


class ChatError(Exception):
    """The server refused or failed. The message is for the user."""


@dataclass(slots=True)
class Conversation:
    """The messages so far, and where they go."""

    client: httpx.Client
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """Send `text`, yield the answer's pieces. Both are remembered once the answer is whole.

        Raises ChatError."""
        question = {"role": "user", "content": text}
        pieces = []
        for piece in _stream(self.client, self._body(question)):
            pieces.append(piece)
            yield piece
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _body(self, question: dict[str, str]) -> dict[str, object]:
        instructions = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, object] = {"model": self.model, "stream": True}
        body["messages"] = [*instructions, *self.messages, question]
        if self.max_tokens is not None:
            body["max_completion_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body


def connect(url: str, api_key: str | None) -> httpx.Client:
    """A client for the API whose base is `url`, with or without /v1."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(300.0, connect=5.0)
    return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout)


def first_model(client: httpx.Client) -> str:
    """The id of the first model that the server lists. Raises ChatError."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatError(_unreachable(client, error)) from None
    if response.status_code != 200:
        raise ChatError(_reason(response.status_code, response.text))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ChatError(f"{client.base_url} lists no models; name one with --model") from None


def talk(conversation: Conversation, ask: Ask, say: Say) -> None:
    """Questions from `ask` until it raises EOFError, answers to `say` as they come."""
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            say(_command(conversation, line) + "\n")
        elif line:
            _answer(conversation, line, say)


def _answer(conversation: Conversation, line: str, say: Say) -> None:
    """Ctrl-C stops an answer, not the chat; an answer that was stopped is not remembered."""
    try:
        for piece in conversation.answer(line):
            say(piece)
        say("\n")
    except KeyboardInterrupt:
        say(" [stopped]\n")
    except ChatError as error:
        say(f"\nerror: {error}\n")


def _command(conversation: Conversation, line: str) -> str:
    name, _, argument = line.partition(" ")
    if name == "/clear":
        conversation.messages.clear()
        return "Forgotten."
    if name == "/system":
        conversation.system = argument.strip() or None
        return "Instructions set." if conversation.system else "Instructions removed."
    return HELP


def _stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatError(_reason(response.status_code, response.read().decode(errors="replace")))
            yield from _pieces(response.iter_lines())
    except httpx.HTTPError as error:
        raise ChatError(_unreachable(client, error)) from None


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise ChatError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                yield text
    raise ChatError("the answer broke off: the connection ended before [DONE]")


def _reason(status: int, text: str) -> str:
    try:
        return f"{json.loads(text)['error']['message']} (HTTP {status})"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {status}: {text[:200]}"


def _unreachable(client: httpx.Client, error: httpx.HTTPError) -> str:
    return f"no answer from {client.base_url}: {error}; is `sluice serve` running there?"
