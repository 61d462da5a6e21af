"""Requests through the real leader, scheduler and runner in this process: output tokens a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from statistics import median

import torch

from engines.native import NativeEngine
from engines.runtime import kv_cache
from engines.runtime.leader import Leader
from engines.runtime.mesh import single
from engines.runtime.runner import ModelRunner
from engines.runtime.scheduler import ContinuousScheduler, Scheduler
from engines.wire import (
    FromWorker,
    Generate,
    SamplingParams,
    Stats,
    Tokens,
    ToWorker,
    encode,
)
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.decode import record
from tests.bench.gpu.options import Options
from tests.bench.gpu.timing import timed

ROUNDS = 3
MAX_BATCHED_TOKENS = 2048  # as `sluice serve` has it
RATE = "tokens_per_s"
_EOS = 1


def measure(bench: Bench) -> None:
    bench.part(RATE, lambda: round(native_rate(bench, bench.engine()), 1))


def beside_ours(bench: Bench, peer: float) -> dict[str, float]:
    """A peer's rate, and ours of the section over it, if that was run."""
    ours = bench.of("offline", RATE)
    return {RATE: round(peer, 1)} | ({} if ours is None else {"ours_over_it": round(ours / peer, 3)})


def native_rate(bench: Bench, engine: NativeEngine) -> float:
    """The median of some rounds, after one that does not count."""
    group = native_group(bench, engine)
    requests = partial(make_requests, bench.options)
    group.seconds(requests(seed=0))
    return median(
        bench.options.num_output_tokens / group.seconds(requests(seed)) for seed in range(1, ROUNDS + 1)
    )


def make_prompts(options: Options, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    size = (options.num_requests, options.prompt_len)
    prompts: list[list[int]] = torch.randint(16, options.shape.vocab, size, generator=generator).tolist()
    return prompts


def make_requests(options: Options, seed: int) -> list[Generate]:
    """Greedy, of one length whatever they say; none shares another's prefix."""
    greedy = SamplingParams(temperature=0.0)
    return [
        Generate(
            id=f"{seed}-{i}",
            prompt_ids=prompt,
            max_tokens=options.output_len,
            sampling=greedy,
            ignore_eos=True,
        )
        for i, prompt in enumerate(make_prompts(options, seed))
    ]


class CountingInbox:
    """Implements the leader's Inbox: messages are encoded as for the gateway, their tokens counted."""

    closed = False

    def __init__(self) -> None:
        self.arrived: list[ToWorker] = []
        self.num_tokens = 0

    def poll(self) -> list[ToWorker]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def wait(self, timeout: float) -> None:
        """There is nobody to wait for."""

    def publish(self, stats: Stats) -> None:
        """Nobody reads them."""

    def send(self, message: FromWorker) -> None:
        encode(message)
        assert isinstance(message, Tokens)
        for delta in message.deltas:
            if delta.error is not None:
                raise RuntimeError(f"request {delta.id} failed: {delta.error.message}")
            self.num_tokens += len(delta.token_ids)


class Group:
    """A scheduler and a runner with their leader."""

    def __init__(
        self, options: Options, scheduler: Scheduler, runner: ModelRunner, plans_in_flight: int
    ) -> None:
        self._options, self._scheduler, self._inbox = options, scheduler, CountingInbox()
        self._leader = Leader(scheduler, runner, self._inbox, plans_in_flight)

    def seconds(self, requests: Sequence[Generate]) -> float:
        """All at once, to their ends."""
        self._inbox.num_tokens = 0
        seconds = timed(lambda: self._run(requests), self._options.device)
        expected = sum(request.max_tokens for request in requests)
        if self._inbox.num_tokens != expected:
            raise RuntimeError(f"{self._inbox.num_tokens} tokens came, not {expected}")
        return seconds

    def _run(self, requests: Iterable[ToWorker]) -> None:
        self._inbox.arrived += requests
        while self._inbox.arrived or self._scheduler.has_work:
            self._leader.step()


def native_group(bench: Bench, engine: NativeEngine) -> Group:
    """As a worker sets it up: on CUDA plans run ahead of their tokens and decoding steps are recorded."""
    options, runs_ahead = bench.options, engine.runs_ahead
    blocks_per_seq = -(-(options.prompt_len + options.output_len) // options.block_size)
    num_blocks = 2 * options.num_requests * blocks_per_seq
    plans_in_flight = engine.plans_in_flight + runs_ahead
    scheduler = ContinuousScheduler(
        num_blocks,
        options.block_size,
        options.num_requests,
        MAX_BATCHED_TOKENS,
        engine.max_model_len,
        [_EOS],
        max_plans_in_flight=plans_in_flight,
        run_ahead=runs_ahead,
        vocab_size=engine.vocab_size,
    )
    caches = kv_cache.allocate(engine.kv_spec, num_blocks + engine.is_recordable, options.block_size)
    runner = ModelRunner(engine, single(bench.device), caches, options.num_requests, runs_ahead=runs_ahead)
    record(runner, engine, num_blocks)
    return Group(options, scheduler, runner, plans_in_flight)
