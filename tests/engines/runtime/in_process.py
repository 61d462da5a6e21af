"""A group in this process: the real leader, scheduler, runner and native engine; no socket, no torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from engines.base import Engine
from engines.runtime import kv_cache
from engines.runtime.decode_graphs import Record
from engines.runtime.grammar import Grammars
from engines.runtime.leader import Leader
from engines.runtime.mesh import single
from engines.runtime.runner import ModelRunner
from engines.runtime.scheduler import ContinuousScheduler, Drafter
from engines.wire import (
    FromWorker,
    Generate,
    Stats,
    Tokens,
    ToWorker,
    encode,
    from_worker_decoder,
    to_worker_decoder,
)
from tests.engines.driver import native
from tests.engines.harness import Ended

EOS = 1


def load(model: Path) -> Engine:
    """The native engine in float32, alone."""
    return native(model, dtype="float32")


class LocalInbox:
    """Implements the leader's Inbox; every message is encoded and decoded as on the socket."""

    closed = False

    def __init__(self) -> None:
        self.arrived: list[ToWorker] = []
        self.ended: dict[str, Ended] = {}
        self.stats: Stats | None = None

    def poll(self) -> list[ToWorker]:
        arrived, self.arrived = self.arrived, []
        return [to_worker_decoder.decode(encode(message)[4:]) for message in arrived]

    def wait(self, timeout: float) -> None:
        """There is nobody to wait for."""

    def publish(self, stats: Stats) -> None:
        self.stats = stats

    def send(self, message: FromWorker) -> None:
        message = from_worker_decoder.decode(encode(message)[4:])
        assert isinstance(message, Tokens)
        for delta in message.deltas:
            ended = self.ended.setdefault(delta.id, Ended())
            assert not ended.has_ended, "a delta after the last"
            ended.take(delta)


class InProcess:
    """One group over `engine`, with a pool of its own. The K/V identity is checked after every round."""

    def __init__(
        self,
        engine: Engine,
        *,
        num_blocks: int = 256,
        block_size: int = 16,
        max_num_seqs: int = 16,
        max_batched: int = 1024,
        prefix_cache: bool = True,
        grammars: Grammars | None = None,
        plans_in_flight: int = 1,
        run_ahead: bool = False,
        drafter: Drafter | None = None,
        record: Record | None = None,
        device: str = "cpu",
    ) -> None:
        assert engine.kv_spec is not None
        self.caches = kv_cache.allocate(engine.kv_spec, num_blocks + (record is not None), block_size)
        self.scheduler = ContinuousScheduler(
            num_blocks,
            block_size,
            max_num_seqs,
            max_batched,
            engine.max_model_len,
            [EOS],
            prefix_cache,
            max_plans_in_flight=plans_in_flight,
            run_ahead=run_ahead,
            vocab_size=engine.vocab_size,
            grammars=grammars,
            drafter=drafter,
        )
        self.inbox = LocalInbox()
        self.num_blocks = num_blocks
        runner = ModelRunner(engine, single(device), self.caches, max_num_seqs, runs_ahead=run_ahead)
        if record is not None:
            runner.record_graphs(num_blocks, engine.max_model_len, record)
        self.leader = Leader(self.scheduler, runner, self.inbox, plans_in_flight)

    def send(self, *messages: ToWorker) -> None:
        self.inbox.arrived += messages

    def ended(self, id: str) -> Ended:
        return self.inbox.ended.setdefault(id, Ended())

    def step(self) -> None:
        self.leader.step()
        self.scheduler.check()

    def run(
        self,
        requests: Iterable[Generate],
        each_round: Callable[[], None] = lambda: None,
        *,
        check: bool = True,
    ) -> list[Ended]:
        """All at once, to their ends."""
        requests = list(requests)
        step = self.step if check else self.leader.step
        self.send(*requests)
        step()
        while self.scheduler.has_work:
            each_round()
            step()
        return [self.ended(request.id) for request in requests]

    def assert_empty(self) -> None:
        """Nothing runs, and no block is lost."""
        stats = self.scheduler.stats(0)
        assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
        assert stats.num_blocks_free + stats.num_blocks_cached == self.num_blocks


@torch.inference_mode()
def alone(engine: Engine, request: Generate, grammars: Grammars | None = None) -> Ended:
    """What `request` gives with nobody else, in one chunk, nothing cached."""
    (ended,) = InProcess(engine, max_num_seqs=1, prefix_cache=False, grammars=grammars).run([request])
    return ended
