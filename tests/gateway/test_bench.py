"""The load generator against a bare asyncio server whose answers are known to the byte."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import bench
from gateway.bench import BenchConfig, make_prompts, quantiles, run, run_level, summarize, to_json
from gateway.sse_client import BenchError, RequestTrace, Target

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Answer = Callable[[dict[str, object]], Iterator[bytes]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def completion_events(body: dict[str, object], usage: bool = True) -> Iterator[bytes]:
    """A completions stream as OpenAI sends it, cut in awkward places."""
    count = body["max_tokens"]
    assert isinstance(count, int)
    events = [event({"choices": [{"text": " a", "index": 0}]}) for _ in range(count)]
    events.append(event({"choices": [{"text": "", "index": 0, "finish_reason": "length"}]}))
    if usage:
        events.append(event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2 * count}}))
    data = b": ping\n\n" + b"".join(events) + b"data: [DONE]\n\n"
    yield OK
    for start in range(0, len(data), 1000):
        yield chunk(data[start : start + 1000])
    yield b"0\r\n\r\n"


@asynccontextmanager
async def fake_server(answer: Answer) -> AsyncIterator[str]:
    """A server that reads one request a connection and writes what `answer` gives for its body."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line[15:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        for data in answer(json.loads(await reader.readexactly(int(length)))):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.anyio
async def test_usage_is_believed_and_only_text_is_timed() -> None:
    async with fake_server(completion_events) as url:
        config = BenchConfig(url=url, model="m", output_len=6)
        (result,) = await run(config, [4], num_requests=8)
    assert (result.num_requests, result.num_failed, result.first_error) == (8, 0, None)
    assert result.num_output_tokens == 8 * 12  # what usage said, not the 6 events
    assert result.num_prompt_tokens == 8 * 5
    assert result.ttft_ms.p50 <= result.latency_ms.p50


@pytest.mark.anyio
async def test_without_usage_the_events_with_text_are_counted() -> None:
    async with fake_server(lambda body: completion_events(body, usage=False)) as url:
        result = await run_level(BenchConfig(url=url, model="m", output_len=6), 1, ["x"])
    assert result.num_output_tokens == 6


@pytest.mark.anyio
async def test_chat_counts_content_but_not_the_role_and_takes_crlf() -> None:
    def chat(body: dict[str, object]) -> Iterator[bytes]:
        assert body["messages"] == [{"role": "user", "content": "hello"}]
        deltas: list[dict[str, object]] = [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
        events = b"".join(event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas)
        yield OK + chunk((events + b"data: [DONE]\n\n").replace(b"\n", b"\r\n")) + b"0\r\n\r\n"

    async with fake_server(chat) as url:
        config = BenchConfig(url=url + "/v1", model="m", endpoint="chat", prompt_kind="text")
        result = await run_level(config, 1, ["hello"])
    assert (result.num_failed, result.num_output_tokens) == (0, 1)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b'HTTP/1.1 429 Too Many\r\nContent-Length: 9\r\n\r\n{"no": 1}', 'HTTP 429: {"no": 1}'),
        (
            b'HTTP/1.1 404 No\r\nContent-Length: 34\r\n\r\n{"error": {"message": "no model"}}',
            "no model (HTTP 404)",
        ),
        (
            OK + chunk(event({"error": {"message": "worker died"}})),
            "the stream ended with an error: worker died",
        ),
        (OK + chunk(event({"choices": [{"text": "a"}]})) + b"0\r\n\r\n", "without [DONE]"),
        (OK + chunk(b"data: {nonsense\n\n"), "not a chunk"),
        (b"SSH-2.0-whatever\r\n", "not HTTP"),
        (b"", "closed without an answer"),
    ],
)
async def test_failures_are_counted_and_named(answer: bytes, reason: str) -> None:
    async with fake_server(lambda body: iter([answer])) as url:
        result = await run_level(BenchConfig(url=url, model="m"), 1, [[1, 2]])
    assert (result.num_failed, result.num_output_tokens) == (1, 0)
    assert reason in (result.first_error or "")


@pytest.mark.anyio
async def test_a_failed_warmup_stops_the_run() -> None:
    with pytest.raises(BenchError, match="nothing answers at 127"):
        await run(BenchConfig(url="http://127.0.0.1:9", model="m"), [1])


@pytest.mark.anyio
async def test_concurrency_is_kept_and_never_exceeded() -> None:
    running, peak, everyone = 0, 0, asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if running == 3:
            everyone.set()
        await everyone.wait()  # nobody is answered before three are here
        writer.write(OK + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        running -= 1
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        config = BenchConfig(url=f"http://127.0.0.1:{port}", model="m")
        result = await run_level(config, 3, [[1]] * 9)
    assert (result.num_failed, peak) == (0, 3)


def test_quantiles_are_nearest_rank() -> None:
    assert quantiles([]).p99 == 0.0
    values = quantiles([float(value) for value in range(100)])
    assert (values.mean, values.p50, values.p90, values.p99) == (49.5, 50.0, 90.0, 99.0)


def test_summary_leaves_failed_requests_out_of_the_times() -> None:
    good = RequestTrace(10.0, 12.0, [10.5, 11.0, 12.0], 4, 3)
    bad = RequestTrace(10.0, 20.0, [19.0], 4, 1, error="died")
    result = summarize(2, [good, bad])
    assert (result.num_failed, result.duration_s, result.output_tokens_per_s) == (1, 10.0, 0.3)
    assert (result.ttft_ms.p50, result.latency_ms.p50) == (500.0, 2000.0)
    assert (result.inter_token_ms.mean, result.time_per_output_token_ms.p50) == (750.0, 750.0)


def test_prompts_differ_from_each_other_and_repeat_with_the_seed() -> None:
    config = BenchConfig(url="u", model="m", prompt_len=20, vocab_size=500)
    prompts = make_prompts(config, 10)
    assert prompts == make_prompts(config, 10)
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 10
    assert all(len(prompt) == 20 and min(prompt) >= 16 and max(prompt) < 500 for prompt in prompts)


def test_text_prompts_have_exactly_the_length_asked_for(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([Path(bench.__file__).read_text()], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = BenchConfig(
        url="u", model="m", prompt_kind="text", prompt_len=24, tokenizer=str(tmp_path), seed=3
    )
    prompts = make_prompts(config, 5)
    assert [len(tokenizer.encode(prompt).ids) for prompt in prompts] == [24] * 5


def test_wrong_settings_are_named() -> None:
    with pytest.raises(BenchError, match="takes text"):
        asyncio.run(run(BenchConfig(url="u", model="m", endpoint="chat"), [1]))
    with pytest.raises(BenchError, match="not an http"):
        Target.parse("ftp://x", "chat")
    with pytest.raises(BenchError, match="does not exist"):
        make_prompts(BenchConfig(url="u", model="m", prompt_kind="text", tokenizer="/nowhere"), 1)


def test_target_takes_the_base_with_and_without_v1() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "h:1/v1/"):
        assert Target.parse(url, "completions") == Target("h", 1, "/v1/completions", False)
    assert Target.parse("https://h/base/v1", "chat") == Target("h", 443, "/base/v1/chat/completions", True)


@pytest.mark.parametrize(("width", "shares"), [(80, 1), (100, 2)])
def test_the_table_fits_its_width_in_one_line_a_row(width: int, shares: int) -> None:
    from rich.console import Console

    times = [10.0 + 12.345 * n for n in range(1, 20)]
    result = summarize(128, [RequestTrace(0.0, 300.0, times, 512, 2000)] * 512)
    console = Console(width=width, record=True, quiet=False, file=io.StringIO())
    console.print(bench.table(BenchConfig(url="u", model="m"), [result], width))
    (row,) = (line for line in console.export_text().splitlines() if "512" in line)
    assert "…" not in row
    assert row.count(" / ") == 2 * shares
    assert len(row) <= width


def test_json_holds_the_machine_and_not_the_key() -> None:
    config = BenchConfig(url="u", model="m", api_key="sk-secret")
    text = to_json(config, [summarize(1, [RequestTrace(0.0, 1.0, [0.5], 1, 1)])])
    record = json.loads(text)
    assert "sk-secret" not in text
    assert record["machine"]["cores"] >= 1
    assert record["results"][0]["num_output_tokens"] == 1


@pytest.mark.anyio
async def test_long_streams_are_read_whole() -> None:
    async with fake_server(completion_events) as url:
        result = await run_level(BenchConfig(url=url, model="m", output_len=5000), 4, [[1]] * 8)
    assert result.num_output_tokens == 8 * 10000
