"""A small real tokenizer, and applications that serve FakeGroups behind it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread

import httpx
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gateway.app import create_app
from gateway.http_server import make_server
from gateway.router import ServedModel, load_served_model
from gateway.settings import Settings
from gateway.workers.protocol import WorkerGroup
from tests.fakes import FakeGroup, ready

CONTROL_TOKENS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LINES = [
    "Hello world, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus München: schöne Straße, 100 % natürlich.",
    "def main(): return 'Hello, world!'",
    "user assistant system begin end <| |>",
]


def make_model_dir(directory: Path) -> Path:
    """A model directory without a model: byte-level BPE, control tokens, a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def ids_of(directory: Path, text: str) -> list[int]:
    """The ids of plain text."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def make_group(
    directory: Path, text: str = "Hello world, how are you today?", **options: object
) -> FakeGroup:
    """A group that says `text` and then the end token."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return FakeGroup(
        says=ids_of(directory, text),
        eos_id=tokenizer.token_to_id("<|end|>"),
        **{"info": ready(tokenizer.get_vocab_size()), **options},  # type: ignore[arg-type]
    )


def make_served(directory: Path, *groups: WorkerGroup, **options: object) -> ServedModel:
    named = {
        "name": "demo",
        "aliases": ("org/demo",),
        "created": 1_700_000_000,
        "recovery_wait": 0.05,
    } | options
    return load_served_model(directory, groups=groups, **named)  # type: ignore[arg-type]


def make_app(
    directory: Path, *groups: WorkerGroup, settings: Settings | None = None, **options: object
) -> FastAPI:
    return create_app(settings or Settings(), [make_served(directory, *groups, **options)])


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The application on a free port, in this loop, so that a test can look into its groups."""
    server = make_server(app, flush_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server._serve([listener]))
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=20) as client:
                yield client
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait_for(serving, 10)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a free port of 127.0.0.1, in a thread with an event loop of its own."""
    server = make_server(app, flush_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def data_of(stream: bytes) -> list[bytes]:
    """The data of each event; fails on anything that is neither data nor a comment."""
    events = stream.split(b"\n\n")
    assert events.pop() == b""
    lines = [event for event in events if not event.startswith(b":")]
    assert all(line.startswith(b"data: ") and b"\n" not in line and b"\r" not in line for line in lines)
    return [line.removeprefix(b"data: ") for line in lines]


def texts_of(stream: bytes) -> Sequence[str]:
    """The contents of a chat stream's chunks."""
    chunks = [json.loads(data) for data in data_of(stream) if data != b"[DONE]"]
    return [
        choice["delta"]["content"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["delta"].get("content")
    ]
