"""generate() of a group, over a FakeWorker in a process of its own."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from pathlib import Path

import pytest

from gateway.workers.group import Group
from gateway.workers.protocol import GroupState, QueueFull, WorkerGroup, WorkerLost, WorkerUnavailable
from tests.fake_worker import Behaviour
from tests.gateway.groups import (
    changing_group,
    fake_config,
    fake_group,
    read,
    request,
    supervised,
    until,
    until_ready,
)

pytestmark = pytest.mark.anyio
ENDLESS = 4000


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def test_tokens_come_in_order_and_end(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        as_seen_by_others: WorkerGroup = group
        assert as_seen_by_others.info is not None
        assert as_seen_by_others.info.engine == "fake"
        deltas = [delta async for batch in group.generate(request(5)) for delta in batch]
        assert [delta.token_ids for delta in deltas] == [[1], [2], [3], [1], [2]]
        assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
        assert group.num_outstanding == 0


async def test_many_at_once(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(Behaviour(max_num_seqs=8))) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        streams = [group.generate(request(4, (number,))) for number in range(50)]
        assert group.num_outstanding == 50
        answers = await asyncio.gather(*map(read, streams))
        assert answers == [[number] * 4 for number in range(50)]
        assert group.num_outstanding == 0


async def test_a_refused_request_ends_alone(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        other = group.generate(request(20))
        (refused,) = [delta async for batch in group.generate(request(10**6)) for delta in batch]
        assert refused.error is not None
        assert refused.error.code == "too_long"
        assert len(await read(other)) == 20


@pytest.mark.parametrize("way", ["aclose", "cancel", "aclosing", "dropped"])
async def test_leaving_early_aborts_the_sequence_in_the_worker(tmp_path: Path, way: str) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        stream = group.generate(request(ENDLESS))
        await anext(stream)
        await until(lambda: group.stats and group.stats.num_running == 1)
        if way == "aclose":
            await stream.aclose()
        elif way == "aclosing":
            async with aclosing(stream):
                await anext(stream)
        elif way == "cancel":
            reading = asyncio.create_task(read(stream))
            await asyncio.sleep(0.02)
            reading.cancel()
            await asyncio.wait([reading])
            assert reading.cancelled()
        else:
            del stream
            gc.collect()
        assert group.num_outstanding == 0
        await until(lambda: group.stats and group.stats.num_running == 0)
        assert await read(group.generate(request(2))) == [1, 2]


async def test_closing_what_was_never_read_or_has_ended(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        unread = group.generate(request(ENDLESS))
        await unread.aclose()
        assert group.num_outstanding == 0
        ended = group.generate(request(2))
        await read(ended)
        await ended.aclose()
        await ended.aclose()
        assert [delta async for delta in ended] == []


async def test_the_queue_is_bounded(tmp_path: Path) -> None:
    spec = fake_group(Behaviour(max_num_seqs=2), fake_config(job_queue_size=3))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        streams = [group.generate(request(ENDLESS)) for _ in range(5)]
        with pytest.raises(QueueFull, match="jobQueueSize") as refusal:
            group.generate(request(1))
        assert refusal.value.retry_after >= 1
        await streams[0].aclose()
        last = group.generate(request(1))
        for stream in streams[1:]:
            await stream.aclose()
        assert await read(last) == [1]


async def test_nothing_within_the_response_timeout(tmp_path: Path) -> None:
    spec = fake_group(Behaviour(mute_prompt=66), fake_config(response_timeout=0.4))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        other = group.generate(request(600))
        with pytest.raises(TimeoutError, match="responseTimeout"):
            await read(group.generate(request(5, (66,))))
        assert len(await read(other)) == 600  # steps went on: the group is not to blame
        assert group.num_restarts == 0
        await until(lambda: group.stats and group.stats.num_waiting == 0)


async def test_not_ready_is_unavailable_with_a_time(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(Behaviour(load_seconds=0.5))) as supervisor:
        (group,) = supervisor.groups
        with pytest.raises(WorkerUnavailable, match="starting") as refusal:
            group.generate(request())
        assert 1 <= refusal.value.retry_after <= 60
        await until(lambda: group.progress is not None and group.progress.fraction == 0.5)
        assert group.state is GroupState.STARTING
        await until_ready(group)
        assert await read(group.generate(request(1))) == [1]
        supervisor.drain()
        with pytest.raises(WorkerUnavailable, match="draining"):
            group.generate(request())
    with pytest.raises(WorkerUnavailable, match="stopped"):
        group.generate(request())


async def test_the_time_to_retry_follows_the_measured_start() -> None:
    group = Group("fake/0", fake_config())
    group.die("killed")
    group.wait_for_restart(5.0)
    with pytest.raises(WorkerUnavailable, match="restarting: killed") as refusal:
        group.generate(request())
    assert refusal.value.retry_after == 15  # the back-off, and the start's guessed 10 s


async def test_a_death_underway_is_worker_lost_after_what_came(tmp_path: Path) -> None:
    starts = iter([Behaviour(die_at_step=4), Behaviour()])
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        got: list[int] = []
        with pytest.raises(WorkerLost):
            await read(group.generate(request(ENDLESS)), into=got)
        assert got == [1, 2, 3]
        assert group.num_outstanding == 0
        await until(lambda: group.num_restarts == 1 and group.state is GroupState.READY)
        assert await read(group.generate(request(3))) == [1, 2, 3]
