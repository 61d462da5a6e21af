"""A chat in the terminal over the HTTP API: `sluice chat`. Works with any OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx

from gateway.api_client import ServerError, refusal, unreachable

HELP = "/clear forgets the conversation, /system TEXT sets the instructions, /exit or Ctrl-D leaves."

Ask = Callable[[], str]
Say = Callable[[str], None]


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

        Raises ServerError."""
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


def talk(conversation: Conversation, ask: Ask, say: Say, complain: Say) -> int:
    """Questions from `ask` until it raises EOFError, answers to `say` as they come, errors to `complain`.

    Returns how many questions failed."""
    num_failed = 0
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return num_failed
        if line in ("/exit", "/quit"):
            return num_failed
        if line.startswith("/"):
            say(_command(conversation, line) + "\n")
        elif line:
            num_failed += not _answer(conversation, line, say, complain)


def _answer(conversation: Conversation, line: str, say: Say, complain: Say) -> bool:
    """Whether it did not fail. Ctrl-C stops an answer, not the chat; what was stopped is not remembered."""
    try:
        for piece in conversation.answer(line):
            say(piece)
        say("\n")
    except KeyboardInterrupt:
        say(" [stopped]\n")
    except ServerError as error:
        complain(f"\nerror: {error}\n")
        return False
    return True


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
                raise ServerError(refusal(response.status_code, response.read().decode(errors="replace")))
            yield from _pieces(response.iter_lines())
    except httpx.HTTPError as error:
        raise ServerError(unreachable(str(client.base_url), error)) from None


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise ServerError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                yield text
    raise ServerError("the answer broke off: the connection ended before [DONE]")
