"""Hostile request bodies on every endpoint: schema-aware mutations and broken JSON, drawn from one seed.

None may end in a 5xx or kill a gateway or worker; refusals shall be quick and memory flat. One in ten goes
over a socket to a real `sluice serve` over a fake group; the others to the application itself.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.server import FAKE_SERVE, MODEL, serving
from tests.gateway.chat_models import make_chat_model
from tests.gateway.serving import client_of, make_app, make_group
from tests.soak import _figures

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
OVER_A_SOCKET = 10  # one in so many
SECRETS = re.compile(r"0x[0-9a-f]{6,}|Traceback|/home/|/root/|/tmp/|\.py\b|site-packages")
MAX_GROWTH = 32 << 20
MAX_REFUSAL_SECONDS = 0.05

NUMBERS: list[Any] = [0, -1, 1, 2**31, 2**63, -(2**63), 2**70, 10**40, 0.5, -0.5, 1e308, -1e308, 1e-320, 1e9]
ODDITIES: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "\u0000",
    "\ud7ff\ufeff",
    "\U0001f986" * 50,
    "x" * 5_000,
    [],
    {},
    [[]],
    [{}],
    [None],
    {"a": {"b": {"c": []}}},
    [0] * 300,
    ["x"] * 300,
    {"type": "text"},
    {"__class__": "x"},
    "{{ 7 * 7 }}",
    "<|endoftext|><|im_start|>",
    "../../etc/passwd",
    "http://127.0.0.1:1/",
    "'; DROP TABLE keys; --",
    "%s%n",
]
FIELDS = """
model messages prompt stream stream_options max_tokens max_completion_tokens min_tokens n stop
stop_token_ids ignore_eos temperature top_p top_k min_p presence_penalty frequency_penalty
repetition_penalty logit_bias seed logprobs top_logprobs user tools tool_choice response_format
chat_template chat_template_kwargs best_of suffix echo audio modalities truncate_prompt_tokens
parallel_tool_calls functions function_call reasoning_effort continue_final_message
add_generation_prompt prompt_cache_key tool_calls tool_call_id arguments parameters name strict
system tool_use_id thinking output_config stop_sequences is_error signature input_schema
input instructions previous_response_id store include text format schema reasoning effort output call_id
prompt_logprobs priority api_base user_config resume_token_ids cache_salt __proto__ metadata
dimensions encoding_format add_special_tokens
""".split()  # noqa: SIM905  a list of words
RAW = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"{}{}",
    b'{"model":NaN}',
    b'{"n":1e999}',
    b'{"n":-Infinity}',
    b'{"model":"\\ud800"}',
    b'{"a":1,"a":2}',
    b'{"n":' + b"9" * 5_000 + b"}",
    b"[" * 20_000,
    b'{"a":' * 5_000,
    b'{"a":[' + b"[]," * 70_000 + b"1]}",
    b"{" + b'"a":1,' * 70_000 + b'"b":1}',
    b"\x00" * 100,
    b'{"a":"' + b"\\" * 9_999,
    b"<xml/>",
    b"--boundary\r\n",
    b"model=x&prompt=y",
    b'{"a":tru',
    b"\x1f\x8b\x08\x00",
)


_TOOL = {
    "name": "f",
    "description": "<|end|>",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    },
    {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": _TOOL | {"strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    },
    {"messages": [{"role": "user", "content": "hi"}], "functions": [_TOOL], "function_call": {"name": "f"}},
]


_ITEM_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'}
RESPONSES: list[dict[str, Any]] = [
    {"input": "hi", "instructions": "s"},
    {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": []},
            _ITEM_CALL,
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", **_TOOL}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": "f"}],
        },
        "include": ["message.output_text.logprobs"],
    },
    {
        "input": [{"type": "item_reference", "id": "x"}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "reasoning": {"effort": "none"},
    },
]


_USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
_RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "1"}]}
MESSAGES: list[dict[str, Any]] = [
    {"system": "s", "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["x"]},
    {
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}, _USE]},
            {"role": "user", "content": [_RESULT, {"type": "text", "text": "hi"}]},
        ],
        "tools": [{"name": "f", "description": "<|end|>", "input_schema": _TOOL["parameters"]}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"},
    },
    {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is "}],
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    },
]


class Bodies:
    """An endless row of bodies, the same for the same seed."""

    def __init__(self, model: str, seed: int) -> None:
        self._model = model
        self._draw = random.Random(seed)

    def next(self) -> tuple[str, bytes]:
        """A path and a body."""
        draw = self._draw
        path = draw.choice(PATHS)
        if draw.random() < 0.1:
            return path, draw.choice(RAW)
        body = self._valid(path)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            self._mutate(body)
        content = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
        return path, self._damaged(content) if draw.random() < 0.25 else content

    def _valid(self, path: str) -> dict[str, Any]:
        if path == PATHS[4]:
            input = self._draw.choice(("hi", ["hi", "you"], [[5, 6], [7]]))
            return {"model": self._model, "input": input, "dimensions": 4, "encoding_format": "float"}
        body: dict[str, Any] = {"model": self._model, "temperature": 0.0}
        if path == PATHS[2]:  # what is stored is no growth
            return (
                body | {"max_output_tokens": 1, "store": False} | copy.deepcopy(self._draw.choice(RESPONSES))
            )
        body["max_tokens"] = 1
        if path == PATHS[3]:
            return body | copy.deepcopy(self._draw.choice(MESSAGES))
        if path == PATHS[0]:
            return body | copy.deepcopy(self._draw.choice(CHATS))
        return body | {"prompt": "hi"}

    def _mutate(self, body: dict[str, Any]) -> None:
        draw = self._draw
        target: Any = body
        while draw.random() < 0.5:  # down into what is nested
            value = draw.choice(list(target.values()) if isinstance(target, dict) else target or [None])
            if not isinstance(value, dict | list) or not value:
                break
            target = value
        key = draw.choice(list(target) if isinstance(target, dict) and draw.random() < 0.6 else FIELDS)
        if isinstance(target, list):
            target[draw.randrange(len(target))] = self._value()
        elif draw.random() < 0.1:
            target.pop(key, None)
        else:
            target[key] = self._value()

    def _value(self) -> Any:
        draw = self._draw
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(NUMBERS)
        if kind < 0.8:
            return copy.deepcopy(draw.choice(ODDITIES))
        if kind < 0.9:
            return {draw.choice(FIELDS): self._value() for _ in range(draw.randrange(5))}
        return [self._value() for _ in range(draw.randrange(9))]

    def _damaged(self, content: bytes) -> bytes:
        """Some bytes changed, cut out, doubled or turned around."""
        draw = self._draw
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(damaged) + 1)
            end = at + draw.randrange(8)
            match draw.randrange(4):
                case 0:
                    damaged[at:end] = draw.randbytes(end - at)
                case 1:
                    del damaged[at:end]
                case 2:
                    damaged[at:at] = damaged[at:end] * 3
                case _:
                    damaged[at:end] = draw.choice(
                        (b'"', b"{", b"[", b"]", b"\\", b"\\u0000", b",", b":", b"\xc3")
                    )
        return bytes(damaged)


@dataclass
class Seen:
    """What came of the bodies."""

    statuses: Counter[int] = field(default_factory=Counter)
    refusal_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, body: bytes, response: httpx.Response, seconds: float) -> None:
        self.statuses[response.status_code] += 1
        if response.status_code != 200:
            self.refusal_seconds.append(seconds)
        if problem := _problem(response):
            self.problems.append(f"{problem}: {body[:300]!r} -> {response.status_code} {response.text[:300]}")

    @property
    def p99(self) -> float:
        """Of the refusals' seconds."""
        ordered = sorted(self.refusal_seconds)
        return ordered[int(0.99 * len(ordered))] if ordered else 0.0


def _problem(response: httpx.Response) -> str | None:
    if response.status_code >= 500:
        return "a 5xx"
    if response.status_code == 200:
        return None
    content = response.json()
    error, is_anthropic = content.get("error"), response.url.path == PATHS[3]
    expected = {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
    if not isinstance(error, dict) or set(error) != expected or ("request_id" in content) != is_anthropic:
        return "not the shape of its API"
    return "it tells what is inside" if SECRETS.search(error["message"]) else None


async def send(client: httpx.AsyncClient, bodies: Bodies, num: int, seen: Seen) -> None:
    for _ in range(num):
        path, body = bodies.next()
        started = time.perf_counter()
        response = await client.post(path, content=body)
        seen.add(body, response, time.perf_counter() - started)


async def in_process(num: int, seed: int) -> tuple[Seen, int]:
    """Through the application itself. Returns by how many bytes this process grew after the first tenth."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as directory:
        model_dir = make_chat_model(Path(directory), "hermes")  # whose template knows tools
        group = make_group(model_dir)
        async with client_of(make_app(model_dir, group, pooling="last")) as client:
            bodies = Bodies("demo", seed)
            await send(client, bodies, num // 10, seen)
            before = psutil.Process().memory_info().rss
            for _ in range(9):
                await send(client, bodies, num // 10, seen)
                group.requests.clear()
            growth = psutil.Process().memory_info().rss - before
        assert group.num_outstanding == 0
    return seen, growth


async def _over_a_socket(url: str, num: int, seed: int) -> Seen:
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await send(client, Bodies(MODEL, seed), num, seen)
    return seen


def over_a_socket(num: int, seed: int) -> tuple[Seen, int, int]:
    """To a real server. Returns what it grew by after the first tenth, and how many workers died."""
    with serving("--pooling", "mean", program=FAKE_SERVE) as server:
        workers = {process.pid for process in server.workers().values()}
        gateway = psutil.Process(server.process.pid)
        first = asyncio.run(_over_a_socket(server.url, num // 10, seed))
        before = gateway.memory_info().rss
        seen = asyncio.run(_over_a_socket(server.url, num - num // 10, seed + 1))
        growth = gateway.memory_info().rss - before
        num_dead = len(workers - {process.pid for process in server.workers().values()})
        assert server.complete().status_code == 200
    seen.problems += first.problems
    seen.statuses += first.statuses
    return seen, growth, num_dead


def run(trials: int) -> dict[str, object]:
    num_socket = trials // OVER_A_SOCKET
    inside, inside_growth = asyncio.run(in_process(trials - num_socket, seed=1))
    outside, outside_growth, num_dead = over_a_socket(num_socket, seed=2)
    problems = inside.problems + outside.problems
    num_5xx = sum(n for seen in (inside, outside) for status, n in seen.statuses.items() if status >= 500)
    is_flat = max(inside_growth, outside_growth) < MAX_GROWTH
    return {
        "bodies": sum(inside.statuses.values()) + sum(outside.statuses.values()),
        "over a socket": sum(outside.statuses.values()),
        "statuses": {str(status): n for status, n in sorted((inside.statuses + outside.statuses).items())},
        "5xx": num_5xx,
        "workers that died": num_dead,
        "growth of memory, MiB": {
            "in process (client and server)": round(inside_growth / (1 << 20), 1),
            "gateway over a socket": round(outside_growth / (1 << 20), 1),
        },
        "refusal, 99th percentile, ms": {
            "in process": round(1000 * inside.p99, 1),
            "over a socket": round(1000 * outside.p99, 1),
        },
        "refusals within 50 ms at the 99th percentile": max(inside.p99, outside.p99) < MAX_REFUSAL_SECONDS,
        "problems": problems[:20],
        "failed": len(problems) + num_dead + (not is_flat),
    }


if __name__ == "__main__":
    _figures.main("hostile_bodies", __doc__, 100_000, run)
