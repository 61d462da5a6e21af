"""Fakes of what stands behind the gateway: groups that say what a test tells them to."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from engines.wire import (
    FinishReason,
    Generate,
    Pooling,
    Progress,
    Ready,
    RequestError,
    Stats,
    TokenDelta,
    TokenLogprob,
)
from gateway.workers.protocol import GroupState, Take, WorkerLost, WorkerUnavailable

HIDDEN_SIZE = 8


def ready(vocab_size: int, max_model_len: int = 512, max_num_seqs: int = 64) -> Ready:
    """What a group says when it is ready."""
    return Ready(
        engine="fake",
        dtype="float32",
        device="cpu",
        tp_size=1,
        pp_size=1,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_blocks=64,
        block_size=16,
        eos_token_ids=[],
        fingerprint="fp_fake",
        load_seconds=0.1,
        pids=[],
    )


@dataclass(kw_only=True)
class FakeGroup:
    """Says `says`, one token a delta, whatever it is asked; then, if there is room, the end token.

    `fails_after` tokens it raises `failure` (and is ready no more if that is the end of the group); after
    `waits_after` tokens it waits for `go_on`.
    """

    says: list[int]
    info: Ready | None
    eos_id: int | None = None
    name: str = "fake/0"
    state: GroupState = GroupState.READY
    progress: Progress | None = None
    stats: Stats | None = None
    num_outstanding: int = 0
    failure: str | None = None
    num_restarts: int = 0
    num_cached_tokens: int = 0
    tokens_per_delta: int = 1
    fails_after: int | None = None
    fails_with: Exception | RequestError = field(default_factory=lambda: WorkerLost("rank 1 died"))
    waits_after: int | None = None
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[Generate] = field(default_factory=list)
    closed_early: list[str] = field(default_factory=list)

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        if self.state is not GroupState.READY:
            raise WorkerUnavailable("not ready", retry_after=3)
        self.requests.append(request)
        self.num_outstanding += 1
        has_ended = False
        try:
            for place, delta in enumerate(self._deltas(request)):
                num_sent = len(request.resume_token_ids) + place * self.tokens_per_delta
                if self.waits_after is not None and num_sent >= self.waits_after:
                    await self.go_on.wait()
                if self.fails_after is not None and num_sent >= self.fails_after:
                    delta = self._failure(request)
                has_ended = delta.finish_reason is not None or delta.error is not None
                if take is None or not take(delta):
                    yield [delta]
        finally:
            self.num_outstanding -= 1
            if not has_ended:
                self.closed_early.append(request.id)

    def _failure(self, request: Generate) -> TokenDelta:
        if isinstance(self.fails_with, WorkerLost):
            self.state = GroupState.RESTARTING
        if isinstance(self.fails_with, Exception):
            raise self.fails_with
        return TokenDelta(id=request.id, error=self.fails_with)

    def _deltas(self, request: Generate) -> list[TokenDelta]:
        ids = self.says[: request.max_tokens]
        is_stop = self.eos_id is not None and len(ids) < request.max_tokens
        if self.eos_id is not None and is_stop:
            ids = [*ids, self.eos_id]
        reason: FinishReason = "stop" if is_stop else "length"
        deltas = prompt_deltas(request)
        if request.pooling is not None:
            vector = fake_embedding(request.prompt_ids, request.pooling)
            return [TokenDelta(id=request.id, finish_reason="stop", embedding=vector)]
        if request.max_tokens == 0:
            deltas.append(TokenDelta(id=request.id, finish_reason=reason))
        for start in range(len(request.resume_token_ids), len(ids), self.tokens_per_delta):
            some = ids[start : start + self.tokens_per_delta]
            is_last = start + len(some) == len(ids)
            num_top = request.sampling.logprobs
            delta = TokenDelta(
                id=request.id,
                token_ids=some,
                logprobs=[] if num_top is None else [fake_logprob(id, num_top) for id in some],
                finish_reason=reason if is_last else None,
                is_stop_token=is_last and is_stop,
                num_cached_tokens=self.num_cached_tokens if start == 0 else None,
            )
            deltas.append(delta)
        return deltas


def fake_embedding(prompt_ids: list[int], pooling: Pooling) -> bytes:
    """Of the prompt's last ids, or of their sums, in two of the dimensions."""
    number = sum(prompt_ids) if pooling.method == "mean" else prompt_ids[-1]
    vector = [math.cos(number), math.sin(number), *[0.0] * (HIDDEN_SIZE - 2)][: pooling.dimensions or None]
    return struct.pack(f"<{len(vector)}f", *vector)


def prompt_deltas(request: Generate) -> list[TokenDelta]:
    """The prompt's log-probabilities in two pieces: of each token what `fake_logprob` gives."""
    if request.prompt_logprobs is None or request.resume_token_ids:
        return []
    rest = [fake_logprob(id, request.prompt_logprobs) for id in request.prompt_ids[1:]]
    scores: list[TokenLogprob | None] = [None, *rest]
    half = (len(scores) + 1) // 2
    return [
        TokenDelta(id=request.id, prompt_logprobs=part) for part in (scores[:half], scores[half:]) if part
    ]


def fake_logprob(id: int, num_top: int) -> TokenLogprob:
    """The token itself at probability 1/2, ids above it at 1/4, 1/8 and so on."""
    return TokenLogprob(-math.log(2), [(id + place, -math.log(2) * (place + 1)) for place in range(num_top)])
