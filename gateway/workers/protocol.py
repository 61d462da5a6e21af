"""The gateway's view of a worker group: what the router and the use case need, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from typing import Protocol

from engines.wire import Generate, Progress, Ready, Stats, TokenDelta


class GroupState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    RESTARTING = "restarting"  # died; waiting out the back-off
    FAILED = "failed"  # died in a way that a restart cannot mend
    STOPPED = "stopped"


class WorkerLost(Exception):  # noqa: N818
    """The group died with the request in it. What was delivered stands; nothing more will come."""


class WorkerUnavailable(Exception):  # noqa: N818
    """The group cannot take a request now. `retry_after` in whole seconds, 1 or more."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(WorkerUnavailable):
    """As many sequences wait already as jobQueueSize allows."""


Take = Callable[[TokenDelta], bool]
"""Whether it has dealt with this delta, which then does not come from the iterator."""


class WorkerGroup(Protocol):
    """One torchrun group, dead or alive.

    generate() yields the deltas of one sequence, the last with `finish_reason` or `error`; in one list those
    that came since the last one was taken: a reader that lags catches up in one go. Closing the
    iterator early (aclose, cancellation) aborts the sequence within a step. It raises
    WorkerUnavailable when the group is not READY, QueueFull when enough wait already (both from the call
    itself, before anything is sent), WorkerLost when it dies underway, and TimeoutError
    when nothing came for the model's responseTimeout.

    `take` may be offered what comes while the iterator's reader waits and nothing else has come.
    """

    name: str  # "MODEL/0": the model and the replica
    state: GroupState
    info: Ready | None  # since it was last ready
    progress: Progress | None  # while STARTING
    stats: Stats | None
    failure: str | None  # why it is RESTARTING or FAILED, one line
    num_restarts: int

    @property
    def num_outstanding(self) -> int:
        """Sequences sent and not ended: what the router balances by."""

    def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]: ...
