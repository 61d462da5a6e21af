"""Random mixes of requests in one batch, float32: each gives what it gives alone.

A mix is a pool of blocks, often too small, and some requests that arrive in different rounds, share prefixes
or not, are sampled in every way that the API has, fork (n), resume, are preempted, are aborted. The leader,
the scheduler, the runner and the model are the real ones; the K/V identity is checked after every round.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec
import torch

from engines.base import Engine
from engines.wire import Abort, Generate, SamplingParams, TokenLogprob
from tests.engines.runtime.in_process import Ended, InProcess, alone, load
from tests.models import MHA, make_llama
from tests.soak import _figures

NUM_REQUESTS = 600  # different ones; what each gives alone is computed once
LOGPROB_TOLERANCE = 1e-4
SALTS = (b"", b"", b"one tenant", b"another")


class Requests:
    """`count` different requests, and what each gives alone."""

    def __init__(self, engine: Engine, seed: int, count: int = NUM_REQUESTS) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._stems = [self._ids(self._random.randint(10, 60)) for _ in range(6)]
        self.made = [self._family(number) for number in range(count)]
        self.alone = cache(self._alone)

    def _alone(self, number: int, choice: int) -> Ended:
        return alone(self._engine, self.made[number][choice])

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(2, MHA.vocab) for _ in range(count)]

    def _family(self, number: int) -> list[Generate]:
        """One request, or the n choices of one."""
        draw = self._random
        num_choices = draw.choice((1, 1, 1, 1, 2, 3))
        stem = draw.choice(self._stems)
        first = Generate(
            id=f"{number}",
            prompt_ids=stem[: draw.randint(1, len(stem))] + self._ids(draw.choice((0, 1, 5, 20))),
            max_tokens=draw.choice((1, 3, 6, 10, 14)),
            min_tokens=draw.choice((0, 0, 0, 3)),
            stop_token_ids=draw.choice(([], [], self._ids(3), self._ids(20))),
            ignore_eos=draw.random() < 0.5,
            sampling=self._sampling(),
            group=f"group {number}" if num_choices > 1 else "",
            prompt_logprobs=draw.choice((None, None, None, None, 0, 3)),
            cache_salt=draw.choice(SALTS),
        )
        if draw.random() < 0.15:  # as after a death: what was delivered comes back
            delivered = alone(self._engine, first).token_ids
            first = msgspec.structs.replace(first, resume_token_ids=delivered[: len(delivered) // 2])
        return [msgspec.structs.replace(first, id=f"{number}.{c}", choice=c) for c in range(num_choices)]

    def _sampling(self) -> SamplingParams:
        draw = self._random
        return SamplingParams(
            temperature=draw.choice((0.0, 0.0, 0.7, 1.0, 1.5)),
            top_p=draw.choice((1.0, 1.0, 0.8)),
            top_k=draw.choice((0, 0, 20)),
            min_p=draw.choice((0.0, 0.0, 0.05)),
            presence_penalty=draw.choice((0.0, 0.0, 0.8)),
            frequency_penalty=draw.choice((0.0, 0.0, 0.4)),
            repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
            logit_bias=draw.choice(({}, {}, {self._ids(1)[0]: 3.0, self._ids(1)[0]: -100.0})),
            seed=draw.getrandbits(63),
            logprobs=draw.choice((None, None, 0, 3)),
        )


@dataclass
class Seen:
    """What the mixes amounted to: a mix in which nothing happens proves nothing."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def run_mix(engine: Engine, requests: Requests, draw: random.Random, seen: Seen) -> None:
    block_size = draw.choice((4, 8, 16))
    group = InProcess(
        engine,
        num_blocks=draw.choice((100, 130, 160, 1000)) // block_size,
        block_size=block_size,
        max_num_seqs=draw.choice((2, 4, 8)),
        max_batched=draw.choice((8, 32, 256)),
        prefix_cache=draw.random() < 0.8,
    )
    numbers = draw.sample(range(len(requests.made)), draw.randint(2, 7))
    families = [(number, requests.made[number], draw.randint(0, 4)) for number in numbers]
    aborts = {
        one.id: arrival + draw.randint(0, 8)
        for _, family, arrival in families
        for one in family
        if draw.random() < 0.2
    }
    clock = 0
    while clock <= 4 or group.scheduler.has_work:
        for _, family, arrival in families:
            if arrival == clock:
                group.send(*family)
        group.send(*(Abort(id) for id, when in aborts.items() if when == clock))
        group.step()
        clock += 1
        assert clock < 5000, "it does not end"
    group.assert_empty()
    _count(group, seen.counts)
    for number, family, _ in families:
        for choice, one in enumerate(family):
            compare(one, group, requests.alone(number, choice), one.id in aborts, seen)


def _count(group: InProcess, counts: Counter[str]) -> None:
    stats = group.scheduler.stats(0)
    counts["mixes"] += 1
    counts["preemptions"] += stats.num_preemptions
    counts["prompt tokens"] += stats.num_prompt_tokens
    counts["prompt tokens from the prefix cache"] += stats.num_prefix_hits
    counts["generated tokens"] += stats.num_generated_tokens


def compare(one: Generate, group: InProcess, want: Ended, may_be_aborted: bool, seen: Seen) -> None:
    got = group.ended(one.id)
    seen.counts["sequences"] += 1
    num_tokens = len(one.prompt_ids) + len(one.resume_token_ids)
    if not got.has_ended:
        assert may_be_aborted, "it never ended"
        seen.counts["aborted"] += 1
        want = _prefix(want, len(got.token_ids), got)
    elif got.error is not None or want.error is not None or num_tokens >= group.scheduler.max_model_len:
        seen.counts["refused"] += 1
        if got.error is None or got.error.code != "too_long":
            seen.differences.append(f"{one.id}: {got.error}")
        return
    elif num_tokens + len(want.token_ids) > group.scheduler.max_model_len:
        seen.counts["cut at the pool's length"] += 1
        want = _prefix(want, len(got.token_ids), got)
    if got.token_ids != want.token_ids or got.finish_reason != want.finish_reason:
        seen.differences.append(f"{one!r}\n   got {got.token_ids}\n  want {want.token_ids}")
    elif not (_close(got.logprobs, want.logprobs) and _close(got.prompt_logprobs, want.prompt_logprobs)):
        seen.differences.append(f"{one!r}\n   got {got.logprobs}\n  want {want.logprobs}")
    seen.counts["compared tokens"] += len(got.token_ids)
    seen.counts["compared logprobs"] += len(got.logprobs) + len(got.prompt_logprobs or ())


def _prefix(want: Ended, count: int, got: Ended) -> Ended:
    """What it should have given by then."""
    prompt = want.prompt_logprobs if got.prompt_logprobs is not None else None
    return Ended(want.token_ids[:count], want.logprobs[:count], prompt, finish_reason=got.finish_reason)


def _close(got: list[TokenLogprob | None] | list[TokenLogprob] | None, want: object) -> bool:
    """Equal but for rounding; equally likely tokens may change places."""
    if got is None or want is None:
        return got is want
    assert isinstance(want, list)
    return len(got) == len(want) and all(
        a is b if a is None or b is None else _values_close(a, b) for a, b in zip(got, want, strict=True)
    )


def _values_close(a: TokenLogprob, b: TokenLogprob) -> bool:
    pairs = [(a.logprob, b.logprob), *zip((v for _, v in a.top), (v for _, v in b.top), strict=True)]
    return all(math.isclose(x, y, rel_tol=0, abs_tol=LOGPROB_TOLERANCE) for x, y in pairs)


def run(trials: int, seed: int = 1) -> dict[str, object]:
    torch.set_num_threads(1)
    started = time.monotonic()
    seen = Seen()
    with tempfile.TemporaryDirectory() as directory:
        engine = load(make_llama(Path(directory), MHA, seed=3))
        requests = Requests(engine, seed, min(NUM_REQUESTS, 10 + trials))
        draw = random.Random(seed)
        for _ in range(trials):
            run_mix(engine, requests, draw, seen)
    return {
        **seen.counts,
        "different requests": len(requests.made),
        "seconds": round(time.monotonic() - started),
        "differences": seen.differences[:10],
        "failed": len(seen.differences),
    }


if __name__ == "__main__":
    _figures.main("random_mixes", __doc__, 10_000, run)
