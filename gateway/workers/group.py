"""One worker group as the gateway sees it: its state over all its starts, and generate()."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from engines.config import ModelConfig
from engines.wire import Generate, Progress, Ready, Stats, TokenDelta
from gateway.workers.backoff import retry_after
from gateway.workers.connection import Connection, Inbox, Report
from gateway.workers.protocol import GroupState, QueueFull, Take, WorkerUnavailable

_GUESSED_START_SECONDS = 10.0  # until one start has been measured


class TokenStream(AsyncIterator[list[TokenDelta]]):
    """The deltas of one sequence, as they come, in one list those that are there. Closed, cancelled or
    dropped before its end, it aborts the sequence at once."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self._connection = connection
        self._inbox = inbox

    async def __anext__(self) -> list[TokenDelta]:
        try:
            return await self._inbox.next()
        except BaseException:  # whatever ends the reading ends the sequence; without effect if it has ended
            self._connection.abort(self._inbox.id)
            raise

    async def aclose(self) -> None:
        """Abort the sequence unless it has ended."""
        self._connection.abort(self._inbox.id)

    def __del__(self) -> None:
        self._connection.abort(self._inbox.id)


class Group:
    """Implements protocol.WorkerGroup. The supervisor drives the state with the methods below
    `num_outstanding`; everything runs in one event loop.

        STARTING -> READY -> RESTARTING -> STARTING ...; any -> DRAINING -> STOPPED; any -> FAILED, and then
        STARTING when somebody asks for it
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.name = name
        self.config = config
        self.state = GroupState.STARTING
        self.info: Ready | None = None
        self.progress: Progress | None = None
        self.stats: Stats | None = None
        self.failure: str | None = None
        self.num_restarts = 0
        self.wanted = asyncio.Event()  # after a failure: somebody wants it to be started again
        self._connection: Connection | None = None
        self._started_at = time.monotonic()
        self._start_seconds = _GUESSED_START_SECONDS
        self._expected_at = self._started_at + self._start_seconds

    def generate(self, request: Generate, take: Take | None = None) -> TokenStream:
        """Send one sequence. Raises WorkerUnavailable and QueueFull at once, see protocol.WorkerGroup."""
        if self.state is not GroupState.READY or self.info is None or self._connection is None:
            raise WorkerUnavailable(self._why_not(), self._retry_after())
        running, waiting = self.info.max_num_seqs, self.config.job_queue_size
        if self.num_outstanding >= running + waiting:
            raise QueueFull(
                f"{self.config.model_name} has as many sequences as it takes: {running} that run and "
                f"{waiting} that wait (jobQueueSize)"
            )
        inbox = self._connection.generate(request, self.config.response_timeout, take)
        return TokenStream(self._connection, inbox)

    @property
    def num_outstanding(self) -> int:
        return self._connection.num_outstanding if self._connection is not None else 0

    def start(self, connection: Connection) -> None:
        """A start began; `connection` is where it will report."""
        self._connection = connection
        self.progress = self.stats = None
        self._started_at = time.monotonic()
        self._expected_at = self._started_at + self._start_seconds
        self._become(GroupState.STARTING)

    def report(self, message: Report) -> None:
        """Take in what the group says about itself; why it failed is for the supervisor."""
        if isinstance(message, Progress):
            self.progress = message
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self.info, self.progress, self.failure = message, None, None
            self._start_seconds = time.monotonic() - self._started_at
            self._become(GroupState.READY)

    def die(self, reason: str) -> None:
        """The group is gone, and nothing is sent to it any more."""
        self.failure = reason
        self._become(GroupState.RESTARTING)

    def wait_for_restart(self, delay: float) -> None:
        self._expected_at = time.monotonic() + delay + self._start_seconds

    def drain(self) -> None:
        """Take nothing new."""
        self._become(GroupState.DRAINING)

    def fail(self, reason: str) -> None:
        """For good: no restart will be tried, unless somebody asks for it."""
        self.failure = reason
        self.wanted.clear()
        self._become(GroupState.FAILED)

    def stop(self) -> None:
        self.state = GroupState.STOPPED

    def restart(self, reason: str) -> bool:
        """End a ready group as if it had died; it is started again, and so is one that has failed. False: it
        is neither."""
        if self.state is GroupState.FAILED:
            self.wanted.set()
            return True
        if self.state is not GroupState.READY or self._connection is None:
            return False
        self._connection.lose(reason)
        return True

    async def wait_until_idle(self) -> None:
        if self._connection is not None:
            await self._connection.idle.wait()

    def _become(self, state: GroupState) -> None:
        if self.state not in (GroupState.DRAINING, GroupState.STOPPED):
            self.state = state

    def _why_not(self) -> str:
        reason = f": {self.failure}" if self.failure else ""
        return f"the workers of {self.config.model_name} are {self.state}{reason}"

    def _retry_after(self) -> int:
        return retry_after(self._expected_at, time.monotonic())
