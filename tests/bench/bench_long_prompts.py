"""Prompts of 2,048 tokens, alone and beside streams: `python -m tests.bench.bench_long_prompts --models DIR`.

Alone: the time to the first token, of a new prompt, and of one whose K/V the prefix cache has, next to the
time between two tokens. Beside eight streams: what the gaps between their tokens are before long prompts
come, and while they are read. Over HTTP with SSE, medians over the rounds; with `--vllm` beside vLLM's CPU
build in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from gateway.bench import (
    BenchConfig,
    Prompt,
    RequestTrace,
    Target,
    encode_request,
    machine,
    make_prompts,
    run_request,
)
from tests.bench.bench_peers import Server, model_of, others_stopped, sluice, vllm
from tests.models import SHAPES

LONG, STREAMS, STREAM_PROMPT = 2048, 8, 64
MAX_LEN = 4096


def send(config: BenchConfig, prompt: Prompt, **more: int) -> asyncio.Task[RequestTrace]:
    target = Target.parse(config.url, config.endpoint)
    request = encode_request(replace(config, **more), target, prompt)
    return asyncio.create_task(run_request(request, target, config.timeout))


def first_token_ms(trace: RequestTrace) -> float:
    if trace.error is not None:
        raise SystemExit(trace.error)
    return 1e3 * (trace.event_times[0] - trace.started)


async def alone(server: Server, seed: int) -> dict[str, float]:
    config = server.config(LONG, 64, seed)
    new, again = await twice(config)
    _, of_ids = await twice(replace(config, prompt_kind="ids"))
    between = 1e3 * (new.event_times[-1] - new.event_times[0]) / (len(new.event_times) - 1)
    return {
        "first token, ms": first_token_ms(new),
        "first token of a cached prompt, ms": first_token_ms(again),
        "of one sent as ids, ms": first_token_ms(of_ids),
        "between tokens, ms": between,
        "cached, in steps": first_token_ms(again) / between,
        "of ids, in steps": first_token_ms(of_ids) / between,
    }


async def twice(config: BenchConfig) -> tuple[RequestTrace, RequestTrace]:
    """A prompt, and the same again."""
    (prompt,) = make_prompts(config, 1)
    return await send(config, prompt), await send(config, prompt)


async def beside(server: Server, seed: int, output_len: int) -> dict[str, float]:
    """Three long prompts, one after another, once all streams have been running for a while."""
    config, long = server.config(STREAM_PROMPT, output_len, seed), server.config(LONG, 1, seed + 1)
    tasks = [send(config, prompt) for prompt in make_prompts(config, STREAMS)]
    prompts = make_prompts(long, 3)
    await send(config, make_prompts(replace(config, seed=seed + 2), 1)[0], output_len=40)  # until all run
    sent = time.perf_counter()
    firsts = [first_token_ms(await send(long, prompt)) for prompt in prompts]
    read = time.perf_counter()
    traces = await asyncio.gather(*tasks)
    if any(trace.event_times[-1] < read for trace in traces):
        raise SystemExit("a stream ended before the long prompts were read: raise --output-len")
    started = max(trace.event_times[0] for trace in traces)
    before, during = [], []
    for trace in traces:
        for earlier, later in pairwise(trace.event_times):
            if started < earlier and later < sent:
                before.append(1e3 * (later - earlier))
            elif sent <= later and earlier <= read:
                during.append(1e3 * (later - earlier))
    return {
        "between tokens before, ms": median(before),
        "between tokens while they are read, ms": median(during),
        "worst, ms": max(during),
        "worst over the median before": max(during) / median(before),
        "worst over the median of the whole time": max(during) / median([*before, *during]),
        "first token, ms": median(firsts),
    }


def bench(server: Server, args: argparse.Namespace) -> dict[str, object]:
    by_itself, with_others = [], []
    for seed in range(0, 10 * args.rounds + 1, 10):
        by_itself.append(asyncio.run(alone(server, seed)))
        with_others.append(asyncio.run(beside(server, seed + 5, args.output_len)))
    return {  # the first round warms up
        "alone": _medians(by_itself[1:]),
        f"beside {STREAMS} streams": _medians(with_others[1:]),
    }


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(row[name] for row in rows), 2) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="where the models are made")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-len", type=int, default=600, help="of the streams")
    parser.add_argument("--vllm", type=Path, help="the environment of vLLM's CPU build")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    parser.add_argument("--serve-flag", action="append", default=[], help="passed on to `sluice serve`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, object] = {}
    for shape in args.shapes:
        long_shape = replace(SHAPES[shape], max_positions=MAX_LEN)
        model = model_of(long_shape, args.models / f"{shape}-{MAX_LEN}")
        with ExitStack() as stack:
            sides = {"sluice": stack.enter_context(sluice(model, args.models, args.serve_flag))}
            if args.vllm:
                peer = vllm(model, args.models, args.vllm, args.vllm_dtype, MAX_LEN)
                sides["vllm"] = stack.enter_context(peer)
            measured = {}
            for name, side in sides.items():
                with others_stopped(side, sides.values()):
                    measured[name] = bench(side, args)
            results[shape] = measured
            print(json.dumps({shape: results[shape]}, indent=1), flush=True)
    record = {
        "command": f"python -m tests.bench.bench_long_prompts --shapes {' '.join(args.shapes)}",
        "machine": machine(),
        "prompt tokens": LONG,
        "rounds": args.rounds,
        "results": results,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
