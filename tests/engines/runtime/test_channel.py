"""The group's own wire over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from engines.runtime.channel import LoadReport, Pipe, PlanSender, ReadAhead, connect


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[PlanSender, list[Pipe]]]:
    """A leader and its two followers."""
    sender = PlanSender(tmp_path / "plans.sock", 2)
    pipes = [connect(tmp_path / "plans.sock", 1.0) for _ in range(2)]
    sender.accept(1.0)
    yield sender, pipes
    for end in (sender, *pipes):
        end.close()


def test_plans_reach_every_follower(ends: tuple[PlanSender, list[Pipe]]) -> None:
    sender, pipes = ends
    plan = bytes(range(256)) * 4096
    with ThreadPoolExecutor() as pool:
        received = [pool.submit(pipe.receive) for pipe in pipes]
        sender.send(plan)
        assert [future.result(5) for future in received] == [plan, plan]


def test_reports_reach_the_leader(ends: tuple[PlanSender, list[Pipe]]) -> None:
    sender, pipes = ends
    for rank, pipe in enumerate(pipes, 1):
        pipe.send(msgspec.msgpack.encode(LoadReport(rank=rank, pid=100 + rank, num_blocks=7)))
    assert {(report.rank, report.pid) for report in sender.reports()} == {(1, 101), (2, 102)}


def test_the_path_is_gone_once_everybody_is_in(ends: object, tmp_path: Path) -> None:
    assert not (tmp_path / "plans.sock").exists()


def test_a_dead_leader_is_eof(ends: tuple[PlanSender, list[Pipe]]) -> None:
    sender, pipes = ends
    sender.close()
    with pytest.raises(EOFError):
        pipes[0].receive()


def test_a_dead_follower_is_eof(ends: tuple[PlanSender, list[Pipe]]) -> None:
    sender, pipes = ends
    for pipe in pipes:
        pipe.close()
    with pytest.raises(EOFError):
        sender.reports()


def test_a_missing_follower_is_a_timeout(tmp_path: Path) -> None:
    with closing(PlanSender(tmp_path / "plans.sock", 1)) as sender, pytest.raises(TimeoutError):
        sender.accept(0.05)


def test_a_missing_leader_is_a_timeout(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"plans\.sock"):
        connect(tmp_path / "plans.sock", 0.05)


def test_a_sender_does_not_wait_for_what_is_read_ahead() -> None:
    """More than the sockets hold, nothing of it received yet; then all of it, then the end."""
    leaders, followers = socket.socketpair()
    with followers:
        leader, plans = Pipe(leaders), ReadAhead(Pipe(followers))
        sent = [bytes([number]) * 100_000 for number in range(50)]
        leaders.settimeout(10)
        for data in sent:
            leader.send(data)
        leader.close()
        assert [plans.receive() for _ in sent] == sent
        with pytest.raises(EOFError):
            plans.receive()
