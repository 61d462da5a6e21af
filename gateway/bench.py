"""A load generator for any server that speaks OpenAI's API with SSE: `sluice bench`.

What to send, how many at once, what it came to. One request of it is gateway/sse_client.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gateway.sse_client import BenchError, Endpoint, RequestTrace, Target, run_request

if TYPE_CHECKING:
    from rich.table import Table
    from tokenizers import Tokenizer

PromptKind = Literal["ids", "text"]
Prompt = list[int] | str

LOWEST_PROMPT_ID = 16  # below it vocabularies keep their special tokens


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """What to send where. Lengths are in tokens, the timeout is in seconds without a byte."""

    url: str  # the base, with or without /v1
    model: str
    endpoint: Endpoint = "completions"
    prompt_kind: PromptKind = "ids"
    prompt_len: int = 128
    output_len: int = 64
    vocab_size: int = 1024  # token-id prompts are drawn from LOWEST_PROMPT_ID up to it
    tokenizer: str | None = None  # text prompts of exactly prompt_len; without, about one word a token
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    api_key: str | None = None
    timeout: float = 300.0
    extra_body: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quantiles:
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One concurrency. Times in milliseconds; throughput over the time from first send to last byte.

    `inter_token_ms` is the time between two events with text; `time_per_output_token_ms` divides a
    request's time after its first event by its tokens after the first, so that servers that put
    several tokens into an event compare fairly.
    """

    concurrency: int
    num_requests: int
    num_failed: int
    first_error: str | None
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Quantiles
    inter_token_ms: Quantiles
    time_per_output_token_ms: Quantiles
    latency_ms: Quantiles


def quantiles(values: Sequence[float]) -> Quantiles:
    """Mean and nearest-rank percentiles; zeros for no values."""
    if not values:
        return Quantiles(0.0, 0.0, 0.0, 0.0)
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Quantiles(sum(ordered) / len(ordered), at(0.5), at(0.9), at(0.99))


def summarize(concurrency: int, traces: Sequence[RequestTrace]) -> LevelResult:
    """What the traces of one concurrency come to. Failed requests count only as failed."""
    good = [trace for trace in traces if trace.error is None]
    errors = [trace.error for trace in traces if trace.error is not None]
    duration = max((t.ended for t in traces), default=0.0) - min((t.started for t in traces), default=0.0)
    num_output = sum(trace.num_output_tokens for trace in good)
    return LevelResult(
        concurrency=concurrency,
        num_requests=len(traces),
        num_failed=len(errors),
        first_error=errors[0] if errors else None,
        duration_s=duration,
        num_prompt_tokens=sum(trace.num_prompt_tokens for trace in good),
        num_output_tokens=num_output,
        output_tokens_per_s=num_output / duration if duration else 0.0,
        requests_per_s=len(good) / duration if duration else 0.0,
        ttft_ms=quantiles([1e3 * (t.event_times[0] - t.started) for t in good if t.event_times]),
        inter_token_ms=quantiles([gap for t in good for gap in _gaps_ms(t.event_times)]),
        time_per_output_token_ms=quantiles([_per_token_ms(t) for t in good if t.num_output_tokens > 1]),
        latency_ms=quantiles([1e3 * (t.ended - t.started) for t in good]),
    )


def _gaps_ms(times: Sequence[float]) -> list[float]:
    return [1e3 * (b - a) for a, b in pairwise(times)]


def _per_token_ms(trace: RequestTrace) -> float:
    if not trace.event_times:
        return 0.0
    return 1e3 * (trace.event_times[-1] - trace.event_times[0]) / (trace.num_output_tokens - 1)


# --- prompts -----------------------------------------------------------------------------------


def make_prompts(config: BenchConfig, count: int) -> list[Prompt]:
    """`count` prompts that share no prefix, the same for the same seed."""
    draw = random.Random(config.seed)
    if config.prompt_kind == "ids":
        return [_random_ids(draw, config.vocab_size, config.prompt_len) for _ in range(count)]
    if config.tokenizer is None:
        return [_random_words(draw, config.prompt_len) for _ in range(count)]
    tokenizer = _load_tokenizer(config.tokenizer)
    return [_random_text(draw, tokenizer, config.prompt_len) for _ in range(count)]


def _random_ids(draw: random.Random, vocab_size: int, length: int) -> list[int]:
    if vocab_size <= LOWEST_PROMPT_ID:
        raise BenchError(f"--vocab-size is {vocab_size}; it must be above {LOWEST_PROMPT_ID}")
    return [draw.randrange(LOWEST_PROMPT_ID, vocab_size) for _ in range(length)]


def _random_words(draw: random.Random, length: int) -> str:
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(length))


def _load_tokenizer(path: str) -> Tokenizer:
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise BenchError(f"--tokenizer: {file} does not exist; name a tokenizer.json or its directory")
    return Tokenizer.from_file(str(file))


def _random_text(draw: random.Random, tokenizer: Tokenizer, length: int) -> str:
    """Text that encodes to exactly `length` tokens: cut, decoded and encoded until it does."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    text = ""
    for _ in range(200):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == length:
            return text
        ids = ids[:length] + _random_ids(draw, size, max(0, length - len(ids)))
        text = tokenizer.decode(ids, skip_special_tokens=False).replace("�", "").strip()
    raise BenchError(
        f"no text of exactly {length} tokens was found with this tokenizer; use --prompt-kind ids"
    )


# --- a run -------------------------------------------------------------------------------------


def encode_request(config: BenchConfig, target: Target, prompt: Prompt) -> bytes:
    """The whole HTTP request."""
    body: dict[str, object] = {
        "model": config.model,
        "max_tokens": config.output_len,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if config.ignore_eos:
        body["ignore_eos"] = True
    payload = json.dumps(body | config.extra_body).encode()
    headers = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        "Accept: text/event-stream",
        "Connection: close",
    ]
    if config.api_key:
        headers.append(f"Authorization: Bearer {config.api_key}")
    return "\r\n".join([*headers, "", ""]).encode() + payload


async def run_level(config: BenchConfig, concurrency: int, prompts: Sequence[Prompt]) -> LevelResult:
    """Keep `concurrency` requests running until every prompt has been sent and answered."""
    target = Target.parse(config.url, config.endpoint)
    waiting = [encode_request(config, target, prompt) for prompt in reversed(prompts)]
    traces: list[RequestTrace] = []

    async def client() -> None:
        while waiting:
            traces.append(await run_request(waiting.pop(), target, config.timeout))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(prompts))):
            tasks.create_task(client())
    return summarize(concurrency, traces)


def parse_concurrencies(text: str) -> list[int]:
    """ "1,8,32" as numbers. Raises BenchError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BenchError(
            f"--concurrency {text}: expected positive integers with commas between, such as 1,8,32"
        )
    return [int(part) for part in parts]


def default_num_requests(concurrency: int) -> int:
    return max(8, 4 * concurrency)


async def run(
    config: BenchConfig,
    concurrencies: Sequence[int],
    num_requests: int | None = None,
    num_warmup: int = 1,
    report: Callable[[LevelResult], None] = lambda _: None,
) -> list[LevelResult]:
    """Every concurrency in turn, each with prompts of its own. `report` hears of each as it ends.

    Raises BenchError when the endpoint and the prompts do not go together, or a warm-up fails.
    """
    if config.endpoint == "chat" and config.prompt_kind == "ids":
        raise BenchError("the chat endpoint takes text, not token ids: use --prompt-kind text")
    counts = [num_requests or default_num_requests(c) for c in concurrencies]
    prompts = make_prompts(config, num_warmup + sum(counts))
    warmup = await run_level(config, num_warmup, prompts[:num_warmup])
    if warmup.num_failed:
        raise BenchError(f"the warm-up request failed: {warmup.first_error}")
    results, start = [], num_warmup
    for concurrency, count in zip(concurrencies, counts, strict=True):
        results.append(await run_level(config, concurrency, prompts[start : start + count]))
        report(results[-1])
        start += count
    return results


# --- what to show ------------------------------------------------------------------------------

_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What matrices are multiplied with; the names of processors in virtual machines do not tell."""


def machine() -> dict[str, object]:
    """What the client ran on; figures from elsewhere do not compare."""
    return {
        "cpu": _cpu_model(),
        "vector instructions": [name for name in _VECTOR_FLAGS if name in _cpu_flags()],
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "sluice": version("sluice"),
    }


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_json(config: BenchConfig, results: Sequence[LevelResult]) -> str:
    """The whole run, without the key."""
    settings = {key: value for key, value in asdict(config).items() if key != "api_key"}
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "config": settings,
        "results": [asdict(result) for result in results],
    }
    return json.dumps(record, indent=2) + "\n"


def table(config: BenchConfig, results: Sequence[LevelResult], width: int) -> Table:
    """One row a concurrency; times are p50 / p90 / p99, without p90 where `width` is too small for it."""
    from rich.table import Table

    shares = "p50 / p90 / p99" if width >= _WIDE else "p50 / p99"
    title = f"{config.model}: {config.prompt_len} tokens in, {config.output_len} out; ms are {shares}"
    grid = Table(title=title)
    for name in ("at once", "requests", "failed", "tokens/s", "first token ms", "between tokens ms"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in results:
        counts = (str(row.concurrency), str(row.num_requests), str(row.num_failed))
        times = [_shown(values, width) for values in (row.ttft_ms, row.inter_token_ms)]
        grid.add_row(*counts, _short(row.output_tokens_per_s), *times)
    return grid


_WIDE = 92  # columns that the table takes with three numbers of five digits in a cell


def _shown(values: Quantiles, width: int) -> str:
    shown = (values.p50, values.p90, values.p99) if width >= _WIDE else (values.p50, values.p99)
    return " / ".join(map(_short, shown))


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
