"""Rank 0's loop: take requests in, schedule, run, send tokens out. The only place where all of them meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

import msgspec

from engines.runtime.plan import StepKind, StepPlan, StepResult
from engines.runtime.scheduler import Scheduler
from engines.wire import (
    Abort,
    FrameTooLarge,
    FromWorker,
    Generate,
    RequestError,
    Stats,
    TokenDelta,
    Tokens,
    ToWorker,
)

IDLE_WAIT_SECONDS = 0.25
"""How long an idle leader sleeps between signs of life: its step counter moves at this pace."""

BATCH_WAIT_SECONDS = 0.005
"""How long it sleeps between looks at a static batch that waits to be full."""


class Runner(Protocol):
    """Where plans are executed. See engines/runtime/runner.py."""

    @property
    def num_in_flight(self) -> int: ...

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> tuple[StepPlan, StepResult]: ...


class Inbox(Protocol):
    """The gateway's side of the leader. See engines/runtime/inbox.py."""

    @property
    def closed(self) -> bool: ...

    def poll(self) -> list[ToWorker]: ...

    def wait(self, timeout: float) -> None: ...

    def send(self, message: FromWorker) -> None: ...

    def publish(self, stats: Stats) -> None: ...


def _no_stages() -> list[float]:
    return []


class Leader:
    """Keeps up to `plans_in_flight` plans submitted and collects them in order.

    `stage_busy_seconds` reads how long each stage of a pipeline has computed, first to last.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        inbox: Inbox,
        plans_in_flight: int,
        stage_busy_seconds: Callable[[], list[float]] = _no_stages,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._inbox = inbox
        self._plans_in_flight = plans_in_flight
        self._stage_busy_seconds = stage_busy_seconds
        self._num_steps = self._num_active_steps = 0
        self._num_idle_rounds = 0
        self._num_computed_tokens = 0
        self._tokens_in_flight: deque[int] = deque()  # of each plan
        self._active_seconds = 0.0

    def run(self) -> None:
        """Until the gateway is gone."""
        while not self._inbox.closed:
            self.step()

    def step(self) -> None:
        """One round: submit what can be submitted, collect one plan, or sleep a while."""
        started = perf_counter()
        self._take_requests()
        self._submit_plans()
        self._inbox.publish(self._stats())  # what a heartbeat in the middle of this round tells
        if self._runner.num_in_flight:
            plan, result = self._runner.collect()
            self._num_computed_tokens += self._tokens_in_flight.popleft()
            self._emit(self._scheduler.update(plan, result))
            seconds = perf_counter() - started
            self._scheduler.took(plan, seconds)
            self._active_seconds += seconds
            self._num_active_steps += 1
            self._num_idle_rounds = 0
        elif self._scheduler.has_work:  # which no plan takes up: a static batch that may still fill
            self._inbox.wait(BATCH_WAIT_SECONDS)
        else:
            self._num_idle_rounds += 1
            if self._num_idle_rounds == 2:  # nothing came for a while: there is time for it
                self._scheduler.audit()
            self._inbox.wait(IDLE_WAIT_SECONDS)
        self._num_steps += 1

    def _stats(self) -> Stats:
        return msgspec.structs.replace(
            self._scheduler.stats(self._num_steps),
            num_computed_tokens=self._num_computed_tokens,
            num_step_tokens=max(self._tokens_in_flight, default=0),
            num_active_steps=self._num_active_steps,
            active_seconds=self._active_seconds,
            stage_busy_seconds=self._stage_busy_seconds(),
        )

    def _take_requests(self) -> None:
        for message in self._inbox.poll():
            match message:
                case Generate():
                    self._emit(self._scheduler.add(message))
                case Abort():
                    self._scheduler.abort(message.id)

    def _submit_plans(self) -> None:
        while self._runner.num_in_flight < self._plans_in_flight and self._scheduler.has_work:
            plan = self._scheduler.schedule()
            if plan.kind != StepKind.RUN:
                return
            self._runner.submit(plan)
            self._tokens_in_flight.append(plan.num_tokens)

    def _emit(self, deltas: list[TokenDelta]) -> None:
        if not deltas:
            return
        try:
            self._inbox.send(Tokens(deltas))
        except FrameTooLarge:
            self._emit_one_by_one(deltas)

    def _emit_one_by_one(self, deltas: list[TokenDelta]) -> None:
        """A delta that is too large for a frame of its own is its sequence's end."""
        for delta in deltas:
            try:
                self._inbox.send(Tokens([delta]))
            except FrameTooLarge as error:
                self._scheduler.abort(delta.id)
                end = TokenDelta(id=delta.id, error=RequestError("internal", str(error)))
                self._inbox.send(Tokens([end]))
