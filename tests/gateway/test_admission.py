"""The queue in front of the groups: its order without a loop, and the waiting itself with one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.wire import Stats
from gateway.admission import Admission, FairQueue, QueueTimeout, capacity, num_ahead
from gateway.metrics import ModelMetrics
from gateway.router import ModelFailed, ShuttingDown
from gateway.workers.protocol import GroupState, QueueFull
from tests.fakes import FakeGroup, ready
from tests.gateway.groups import until
from tests.gateway.serving import make_served
from tests.soak import overload

# The order


def push_all(queue: FairQueue[str], *items: str) -> None:
    """Each is its key and a number: a1."""
    for item in items:
        assert queue.push(item[0], item, 0.0) is None


def pop_all(queue: FairQueue[str], num_tokens: int = 10) -> list[str]:
    order = []
    while (popped := queue.pop()) is not None:
        key, item = popped
        queue.charge(key, num_tokens)
        order.append(item)
    return order


def test_one_key_is_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue(10)
    push_all(queue, "a1", "a2", "a3")
    assert pop_all(queue) == ["a1", "a2", "a3"]
    assert queue.pop() is None


def test_a_light_key_waits_for_one_of_a_heavy_ones_not_for_all() -> None:
    queue: FairQueue[str] = FairQueue(2_000)
    push_all(queue, *(f"a{number}" for number in range(1_000)))
    for _ in range(500):
        queue.pop()
        queue.charge("a", 1_000)
    push_all(queue, "b1", "b2")
    order = pop_all(queue)
    assert order.index("b1") == 0
    assert order.index("b2") == 2


def test_keys_take_turns_by_tokens_not_by_requests() -> None:
    queue: FairQueue[str] = FairQueue(400)
    for number in range(100):
        push_all(queue, f"l{number}", f"s{number}")
    given_tokens: Counter[str] = Counter()
    for _ in range(110):
        key, _ = queue.pop() or ("", "")
        num_tokens = 1_000 if key == "l" else 100
        queue.charge(key, num_tokens)
        given_tokens[key] += num_tokens
    assert given_tokens["l"] == pytest.approx(given_tokens["s"], rel=0.15)


def test_a_pause_saves_nothing_up() -> None:
    """b was idle while a was given much; when it comes back it shares, and does not shut a out."""
    queue: FairQueue[str] = FairQueue(400)
    push_all(queue, "b0")
    queue.pop()
    queue.charge("b", 1)
    push_all(queue, *(f"a{number}" for number in range(300)))
    for _ in range(200):
        queue.pop()
        queue.charge("a", 100)
    push_all(queue, *(f"b{number}" for number in range(50)))
    keys = Counter(item[0] for item in pop_all(queue)[:40])
    assert keys == {"a": 20, "b": 20}


def test_what_was_given_while_nobody_waited_is_no_debt() -> None:
    queue: FairQueue[str] = FairQueue(400)
    queue.charge("a", 1_000_000)
    for number in range(20):
        push_all(queue, f"b{number}", f"a{number}")
    assert Counter(item[0] for item in pop_all(queue)[:20]) == {"a": 10, "b": 10}


def test_one_at_a_time_is_next_each_time() -> None:
    """What runs is paid for when it ends, also while its key does not wait."""
    queue: FairQueue[str] = FairQueue(400)
    push_all(queue, *(f"a{number}" for number in range(300)))
    for round in range(20):
        push_all(queue, f"b{round}")
        popped = [queue.pop() for _ in range(4)]
        assert popped[0] == ("b", f"b{round}")
        for key, _ in filter(None, popped):
            queue.charge(key, 14)


def test_a_full_queue_takes_from_the_heaviest() -> None:
    queue: FairQueue[str] = FairQueue(4)
    push_all(queue, "a1", "a2", "a3", "a4")
    assert queue.push("a", "a5", 0.0) == "a5"
    assert queue.push("b", "b1", 0.0) == "a4"
    assert queue.push("b", "b2", 0.0) == "a3"
    assert queue.push("b", "b3", 0.0) == "b3"
    assert queue.push("c", "c1", 0.0) in ("a2", "b2")
    assert len(queue) == 4
    assert (queue.has_room("d", 1), queue.has_room("a", 1)) == (True, False)


def test_age_and_removal() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for since, item in ((1.0, "a1"), (2.0, "b1"), (3.0, "a2")):
        queue.push(item[0], item, since)
    assert queue.oldest == 1.0
    assert sorted(queue.take_since(2.0)) == ["a1", "b1"]
    queue.remove("a", "a2")
    queue.remove("a", "a2")
    assert (len(queue), queue.oldest, queue.pop()) == (0, None, None)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc")),
        st.tuples(st.just("pop"), st.integers(0, 500)),
        st.tuples(st.just("remove"), st.integers(0, 50)),
        st.tuples(st.just("expire"), st.integers(0, 50)),
    ),
    max_size=80,
)


@settings(max_examples=150)
@given(operations, st.integers(0, 8))
def test_nothing_is_lost_or_given_twice(steps: list[tuple[str, object]], max_items: int) -> None:
    """Against a plain set of who waits; within a key the order is that of arrival."""
    queue: FairQueue[tuple[str, int]] = FairQueue(max_items)
    waiting: list[tuple[str, int]] = []
    for now, (step, value) in enumerate(steps):
        if step == "push":
            item = (str(value), now)
            displaced = queue.push(item[0], item, float(now))
            waiting.append(item)
            if displaced is not None:
                assert len(waiting) == max_items + 1
                waiting.remove(displaced)
        elif step == "pop":
            popped = queue.pop()
            assert (popped is None) == (not waiting)
            if popped is not None:
                key, item = popped
                assert item == next(other for other in waiting if other[0] == key)
                waiting.remove(item)
                queue.charge(key, int(str(value)))
        elif step == "remove" and waiting:
            item = waiting.pop(int(str(value)) % len(waiting))
            queue.remove(item[0], item)
        elif step == "expire":
            taken = queue.take_since(float(str(value)))
            assert sorted(taken) == sorted(item for item in waiting if item[1] <= float(str(value)))
            waiting = [item for item in waiting if item not in taken]
        assert len(queue) == len(waiting)
        assert queue.oldest == (min(float(item[1]) for item in waiting) if waiting else None)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=6), st.integers(20, 60))
def test_keys_that_always_wait_are_given_the_same(costs: list[int], rounds: int) -> None:
    """However large their requests: apart by one request of each at most."""
    queue: FairQueue[int] = FairQueue(10_000)
    for key in range(len(costs)):
        for number in range(rounds):
            queue.push(str(key), number, 0.0)
    given_tokens = [0] * len(costs)
    for _ in range(rounds):
        key, _ = queue.pop() or ("", 0)
        queue.charge(key, costs[int(key)])
        given_tokens[int(key)] += costs[int(key)]
    assert max(given_tokens) - min(given_tokens) <= 2 * max(costs)


# How much a group is sent


def group_of(max_num_seqs: int, **options: object) -> FakeGroup:
    return FakeGroup(says=[], info=ready(100, max_num_seqs=max_num_seqs), **options)  # type: ignore[arg-type]


def test_a_group_gets_what_it_runs_and_a_little_more() -> None:
    assert capacity(group_of(64), 1_000) == 64 + 8
    assert capacity(group_of(1), 1_000) == 1 + 2
    assert capacity(group_of(64), 0) == 64
    assert capacity(group_of(64, state=GroupState.RESTARTING), 1_000) == 0


def test_a_group_without_blocks_to_spare_gets_less() -> None:
    stats = Stats(num_steps=1, num_running=20, num_waiting=30, num_blocks_used=900, num_blocks_free=100)
    assert capacity(group_of(64, stats=stats), 1_000) == 20 + 8
    plenty = msgspec.structs.replace(stats, num_blocks_free=2_000)
    assert capacity(group_of(64, stats=plenty), 1_000) == 64 + 8
    served = msgspec.structs.replace(stats, num_waiting=3)
    assert capacity(group_of(64, stats=served), 1_000) == 64 + 8


def test_a_static_batch_is_chosen_from_all_that_wait() -> None:
    group = group_of(8)
    assert group.info is not None
    group.info = msgspec.structs.replace(group.info, num_blocks=8, block_size=512)
    assert capacity(group, 100) == 108


# The waiting


class Sequences:
    """Slots that are held until told otherwise."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.admitted: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, *names: str) -> None:
        """The first letter is the key."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold(name))
        await asyncio.sleep(0)

    async def end(self, *names: str) -> None:
        for name in names:
            self.let_end(name)
            await self.tasks[name]
        await asyncio.sleep(0)

    def let_end(self, name: str) -> None:
        self._ends[name].set()

    async def _hold(self, name: str) -> None:
        async with self.admission.slot(name[0], 10):
            self.admitted.append(name)
            await self._ends[name].wait()


@asynccontextmanager
async def sequences(
    model_dir: Path, *groups: FakeGroup, max_queued: int = 1_000, timeout: float = 60.0
) -> AsyncIterator[Sequences]:
    served = make_served(model_dir, *groups, max_queued=max_queued)
    held = Sequences(Admission(served, ModelMetrics(), timeout))
    yield held
    for task in held.tasks.values():
        task.cancel()
    await asyncio.gather(*held.tasks.values(), return_exceptions=True)
    assert held.admission.num_waiting == 0
    assert held.admission.metrics.num_queued == 0


anyio = pytest.mark.anyio


@anyio
async def test_who_finds_no_place_waits_for_one(model_dir: Path) -> None:
    async with sequences(model_dir, group_of(2)) as held:  # 2 and 2 ahead
        await held.start("a1", "a2", "a3", "a4", "a5", "a6", "b1")
        assert held.admitted == ["a1", "a2", "a3", "a4"]
        assert held.admission.metrics.num_queued == 3
        await held.end("a2")
        assert held.admitted[4:] == ["b1"]
        await held.end("a1", "a3")
        assert held.admitted[5:] == ["a5", "a6"]
        assert sum(held.admission.metrics.queue_time.counts) == 3


@anyio
async def test_one_that_leaves_the_queue_is_not_admitted(model_dir: Path) -> None:
    async with sequences(model_dir, group_of(1)) as held:  # 1 and 2 ahead
        await held.start("a1", "a2", "a3", "a4", "a5")
        held.tasks["a4"].cancel()
        await asyncio.sleep(0)
        await held.end("a1")
        assert held.admitted == ["a1", "a2", "a3", "a5"]


@anyio
async def test_one_that_leaves_as_its_turn_comes_gives_its_place_on(model_dir: Path) -> None:
    """Its place was given in the same round of the loop in which it was cancelled: in either order."""
    for cancel_first in (True, False):
        async with sequences(model_dir, group_of(1)) as held:
            await held.start("a1", "a2", "a3", "a4", "a5")
            if cancel_first:
                held.tasks["a4"].cancel()
            held.let_end("a1")
            await asyncio.sleep(0)  # now its place is a4's, which does not know it yet
            if not cancel_first:
                held.tasks["a4"].cancel()
            await asyncio.wait([held.tasks["a4"]])
            await asyncio.sleep(0.01)
            assert held.admitted == ["a1", "a2", "a3", "a5"]
            assert held.tasks["a4"].cancelled()


@anyio
async def test_a_group_that_becomes_ready_takes_from_the_queue(model_dir: Path) -> None:
    group = group_of(2, state=GroupState.RESTARTING)
    async with sequences(model_dir, group) as held:
        await held.start("a1", "a2")
        await asyncio.sleep(0.1)
        assert held.admitted == []
        group.state = GroupState.READY
        await until(lambda: held.admitted == ["a1", "a2"])


@anyio
@pytest.mark.parametrize(
    ("state", "error"), [(GroupState.FAILED, ModelFailed), (GroupState.DRAINING, ShuttingDown)]
)
async def test_when_no_group_will_ever_take_it_nobody_waits(
    model_dir: Path, state: GroupState, error: type[Exception]
) -> None:
    group = group_of(1)
    async with sequences(model_dir, group) as held:
        await held.start("a1", "a2", "a3", "a4")
        group.state = state
        with pytest.raises(error):
            await held.tasks["a4"]


@anyio
async def test_one_waits_so_long_and_no_longer(model_dir: Path) -> None:
    async with sequences(model_dir, group_of(1), timeout=0.2) as held:
        await held.start("a1", "a2", "a3", "a4")
        with pytest.raises(QueueTimeout, match=r"has waited 0\.2 s") as caught:
            await held.tasks["a4"]
        assert caught.value.retry_after >= 1
        assert held.admitted == ["a1", "a2", "a3"]


@anyio
async def test_a_full_queue_refuses_the_heavy_key_and_takes_the_light_one(model_dir: Path) -> None:
    async with sequences(model_dir, group_of(1), max_queued=6) as held:  # 3 in the group, 4 wait here
        assert num_ahead(ready(100, max_num_seqs=1), 6) == 2
        names = [f"a{number}" for number in range(8)]
        await held.start(*names)
        with pytest.raises(QueueFull):
            await held.tasks["a7"]
        with pytest.raises(QueueFull):
            held.admission.require_room("a", 1)
        held.admission.require_room("b", 2)
        await held.start("b1")
        with pytest.raises(QueueFull):
            await held.tasks["a6"]
        await held.end("a0")
        assert held.admitted[3:] == ["b1"]


@anyio
async def test_it_is_said_when_the_queue_is_empty(model_dir: Path) -> None:
    async with sequences(model_dir, group_of(1)) as held:
        await held.admission.wait_until_empty()
        await held.start("a1", "a2", "a3", "a4")
        empty = asyncio.create_task(held.admission.wait_until_empty())
        await asyncio.sleep(0)
        assert not empty.done()
        await held.end("a1")
        await asyncio.wait_for(empty, 30)


# Ten times overload, for seconds; tests/soak/overload.py is the long version


def test_in_overload_some_are_served_and_all_others_told_when_to_come_again() -> None:
    with overload.overloaded_server() as server:
        result = asyncio.run(overload.overload(server, 3))
    assert overload.check(result) == []
    assert len(result.heavy) > len(result.probes)
