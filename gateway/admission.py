"""Who is next when a model's groups are full: a queue that is fair to keys, in front of the groups.

The groups are sent what they run and a few sequences more, for them to go on with at once; all others wait
here. The next one is of the key that has been given the fewest tokens (virtual token counters: Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024), so a key with a thousand requests delays another
key's one request by one sequence, not by a thousand.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from engines.wire import Ready, Stats
from gateway.metrics import ModelMetrics
from gateway.router import ServedModel, ShuttingDown, ready_groups
from gateway.workers.protocol import GroupState, QueueFull, WorkerGroup, WorkerUnavailable

_LOOK_SECONDS = 0.05  # between two looks at groups and ages while somebody waits
_MAX_RETRY_SECONDS = 30
_CLOSED_RETRY_SECONDS = 1

Item = TypeVar("Item")


class QueueTimeout(WorkerUnavailable):
    """It has waited as long as a sequence may."""


class FairQueue(Generic[Item]):
    """At most `max_items` that wait, by key. Pure policy: no clock, no loop.

    A key that comes back after a pause starts level with the one that has been given least of those that
    wait: neither credit nor debt is kept while nobody competes.
    """

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        self._waiting: OrderedDict[str, deque[tuple[float, Item]]] = OrderedDict()  # key -> (since, item)
        self._given: dict[str, int] = {}  # tokens, by key
        self._level = 0  # where a key starts when nobody waits
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def has_room(self, key: str, count: int) -> bool:
        """Whether push() would take so many more of this key, if need be in the place of others."""
        if len(self) + count <= self.max_items:
            return True
        num_keys = len(self._waiting.keys() | {key})
        return self._count(key) + count <= self.max_items // num_keys

    def push(self, key: str, item: Item, now: float) -> Item | None:
        """Queue it. When the queue is full, the latest of the key with the most items gives way and is
        returned: `item` itself if its own key is that one."""
        if self._num_items >= self.max_items:
            heaviest = max(self._waiting, key=self._count, default=key)
            if self._count(key) + 1 > self._count(heaviest):
                return item
            displaced = self._waiting[heaviest].pop()[1]
            self._drop_if_empty(heaviest)
            self._num_items -= 1
        else:
            displaced = None
        if key not in self._waiting:
            self._given[key] = max(self._given.get(key, 0), self._least_given())
            self._waiting[key] = deque()
            self._waiting.move_to_end(key, last=False)  # before others that have been given as much
        self._waiting[key].append((now, item))
        self._num_items += 1
        return displaced

    def pop(self) -> tuple[str, Item] | None:
        """The next one, with its key."""
        if not self._waiting:
            return None
        key = min(self._waiting, key=self._given.__getitem__)
        self._level = self._given[key]
        _, item = self._waiting[key].popleft()
        self._waiting.move_to_end(key)  # keys that have been given the same take turns
        self._drop_if_empty(key)
        self._num_items -= 1
        return key, item

    def remove(self, key: str, item: Item) -> None:
        """It waits no longer; no effect if it does not."""
        entries = self._waiting.get(key, ())
        for place, (_, other) in enumerate(entries):
            if other is item:
                del self._waiting[key][place]
                self._drop_if_empty(key)
                self._num_items -= 1
                return

    def take_since(self, then: float) -> list[Item]:
        """Those that have waited since `then` or longer; they wait no longer."""
        taken: list[Item] = []
        for key in list(self._waiting):
            entries = self._waiting[key]
            while entries and entries[0][0] <= then:
                taken.append(entries.popleft()[1])
            self._drop_if_empty(key)
        self._num_items -= len(taken)
        return taken

    def charge(self, key: str, num_tokens: int) -> None:
        """The key has been given so many tokens. While nobody waits, that is nobody's loss: whoever comes
        next starts level with it."""
        self._given[key] = self._given.get(key, 0) + num_tokens
        if not self._waiting:
            self._level = max(self._level, self._given[key])

    @property
    def oldest(self) -> float | None:
        """Since when the one waits that has waited longest."""
        return min((entries[0][0] for entries in self._waiting.values()), default=None)

    def _count(self, key: str) -> int:
        return len(self._waiting.get(key, ()))

    def _least_given(self) -> int:
        return min((self._given[key] for key in self._waiting), default=self._level)

    def _drop_if_empty(self, key: str) -> None:
        if not self._waiting[key]:
            del self._waiting[key]


def num_ahead(info: Ready, max_queued: int) -> int:
    """Sequences sent beyond those that run, so that one that ends is followed within the same step."""
    if info.block_size >= info.max_model_len:  # rows of static batches, each of prompts of one length:
        return max_queued  # it needs all of them to choose from
    return min(max(2, info.max_num_seqs // 8), max_queued)


def capacity(group: WorkerGroup, max_queued: int) -> int:
    """How many sequences this group is to have now."""
    info = group.info
    if group.state is not GroupState.READY or info is None:
        return 0
    ahead = num_ahead(info, max_queued)
    if group.stats is not None and _lacks_blocks(group.stats, ahead):
        return min(group.stats.num_running, info.max_num_seqs) + ahead
    return info.max_num_seqs + ahead


def _lacks_blocks(stats: Stats, ahead: int) -> bool:
    """Whether K/V blocks, not sequences, are what the group has too few of."""
    num_left = stats.num_blocks_free + stats.num_blocks_cached
    return stats.num_waiting > ahead and num_left < stats.num_blocks_used


@dataclass(slots=True, eq=False)
class _Waiter:
    num_tokens: int
    admitted: asyncio.Future[None]


class Admission:
    """The queue of one model. `timeout`: seconds that a sequence may wait in it."""

    def __init__(
        self,
        model: ServedModel,
        metrics: ModelMetrics,
        timeout: float,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.model, self.metrics, self._timeout = model, metrics, timeout
        self._queue: FairQueue[_Waiter] = FairQueue(max_items=0)
        self._num_admitted = 0
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._looking: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_closed = False

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Take nothing new; those that wait get their turn."""
        self.is_closed = True

    def require_room(self, key: str, num_sequences: int) -> None:
        """Refuses early what could not even wait. Raises QueueFull, ShuttingDown."""
        if self.is_closed:
            raise ShuttingDown(
                "The server is shutting down and takes no new requests.", _CLOSED_RETRY_SECONDS
            )
        free = max(0, self._capacity() - self._num_admitted - len(self._queue))
        self._queue.max_items = self._max_waiting()
        if num_sequences > free and not self._queue.has_room(key, num_sequences - free):
            raise self._full()

    @asynccontextmanager
    async def slot(self, key: str, num_tokens: int) -> AsyncIterator[None]:
        """A place for one sequence in one of the groups, for as long as the context lasts; `num_tokens` are
        those of its prompt. Raises QueueFull, QueueTimeout, ModelFailed, ShuttingDown."""
        if len(self._queue) or self._num_admitted >= self._capacity():
            await self._wait(key, num_tokens)
        else:
            self._admit(key, num_tokens)
        try:
            yield
        finally:
            self._release()

    def charge(self, key: str, num_tokens: int) -> None:
        """Tokens that were generated for a key."""
        self._queue.charge(key, num_tokens)

    async def wait_until_empty(self) -> None:
        """Until nobody waits any more."""
        await self._idle.wait()

    def _capacity(self) -> int:
        return sum(capacity(group, self.model.max_queued) for group in self.model.groups)

    def _max_waiting(self) -> int:
        """jobQueueSize, less what waits in the groups themselves."""
        limit = self.model.max_queued
        infos = [group.info for group in self.model.groups]
        return sum(limit - (num_ahead(info, limit) if info is not None else 0) for info in infos)

    async def _wait(self, key: str, num_tokens: int) -> None:
        since = self._now()
        waiter = _Waiter(num_tokens, asyncio.get_running_loop().create_future())
        self._queue.max_items = self._max_waiting()
        displaced = self._queue.push(key, waiter, since)
        if displaced is waiter:
            raise self._full()
        if displaced is not None:
            _fail(displaced, self._full())
        self._on_change()
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            self._queue.remove(key, waiter)
            if waiter.admitted.done() and not waiter.admitted.cancelled():  # its turn came as its client left
                self._release()
            self._on_change()
            raise
        self.metrics.queue_time.observe(self._now() - since)

    def _admit(self, key: str, num_tokens: int) -> None:
        self._num_admitted += 1
        self._queue.charge(key, num_tokens)

    def _release(self) -> None:
        self._num_admitted -= 1
        self._fill()

    def _fill(self) -> None:
        """Give the free places to those whose turn it is."""
        num_free = self._capacity() - self._num_admitted if len(self._queue) else 0
        while num_free > 0 and (popped := self._queue.pop()) is not None:
            key, waiter = popped
            if waiter.admitted.done():  # its client has left in this very moment
                continue
            self._admit(key, waiter.num_tokens)
            waiter.admitted.set_result(None)
            num_free -= 1
        self._on_change()

    def _on_change(self) -> None:
        """Gauge, event and timer follow the queue."""
        self.metrics.num_queued = len(self._queue)
        if not self._queue:
            self._idle.set()
        else:
            self._idle.clear()
            if self._looking is None:
                self._looking = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Groups may have become ready, or failed, or got blocks back; and some may have waited too long."""
        self._looking = None
        for waiter in self._queue.take_since(self._now() - self._timeout):
            _fail(waiter, self._timed_out())
        if error := self._never_again():
            while (popped := self._queue.pop()) is not None:
                _fail(popped[1], error)
        self._fill()

    def _never_again(self) -> Exception | None:
        """Why no group will take anything any more."""
        if any(group.state not in _ENDED for group in self.model.groups):
            return None
        try:
            ready_groups(self.model)
        except Exception as error:
            return error
        return None

    def _full(self) -> QueueFull:
        return QueueFull(f"The model '{self.model.name}' has too many requests waiting.", self._retry_after())

    def _timed_out(self) -> QueueTimeout:
        return QueueTimeout(
            f"The model '{self.model.name}' is overloaded: the request has waited {self._timeout:g} s.",
            self._retry_after(),
        )

    def _retry_after(self) -> int:
        """As long as the first in the queue has waited by now."""
        since = self._queue.oldest
        waited = 0.0 if since is None else self._now() - since
        return round(min(max(1.0, waited), _MAX_RETRY_SECONDS))


_ENDED = (GroupState.FAILED, GroupState.DRAINING, GroupState.STOPPED)


def _fail(waiter: _Waiter, error: Exception) -> None:
    if not waiter.admitted.done():
        waiter.admitted.set_exception(error)
