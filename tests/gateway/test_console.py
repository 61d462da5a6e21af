"""What is shown while groups load."""

from __future__ import annotations

import asyncio
import json

import pytest

from engines.wire import Progress
from gateway import console
from gateway.workers.progress import overall_percent
from gateway.workers.protocol import GroupState
from tests.e2e.server import FAKE_SERVE, serving
from tests.fakes import FakeGroup, ready
from tests.waiting import wait_until


def group(state: GroupState, progress: Progress | None = None, failure: str | None = None) -> FakeGroup:
    return FakeGroup(says=[], info=ready(10), state=state, progress=progress, failure=failure)


def test_what_a_group_is_doing_is_a_word_and_the_reason_is_left_to_the_log() -> None:
    assert console.note(group(GroupState.RESTARTING, failure="out of memory")) == "died"
    assert console.note(group(GroupState.FAILED, failure="out of memory")) == "failed"
    assert console.note(group(GroupState.STARTING, Progress("load", 0.2))) == "load"


def test_who_waits_for_a_compiler_is_told_for_how_long() -> None:
    assert console.note(group(GroupState.STARTING, Progress("compile", 0.0))) == (
        "compile: only this once, a minute or more"
    )


def test_plain_lines_come_only_when_something_changes(capsys: pytest.CaptureFixture[str]) -> None:
    display = console.PlainDisplay(console.teller("text"))
    for fraction in (0.0, 0.5, 1.0):
        loading = group(GroupState.STARTING, Progress("load", fraction))
        display.show(loading, overall_percent(loading), console.note(loading))
    display.show(group(GroupState.READY), 100, "ready")
    assert capsys.readouterr().out.splitlines() == ["fake/0: load (10 %)", "fake/0: ready (100 %)"]


@pytest.mark.anyio
async def test_watching_ends_when_every_group_is_settled(capsys: pytest.CaptureFixture[str]) -> None:
    slow, failed = group(GroupState.STARTING), group(GroupState.FAILED, failure="no such file")
    display = console.PlainDisplay(console.teller("text"))
    watching = asyncio.create_task(console.watch([slow, failed], display))
    await asyncio.sleep(0.1)
    assert not watching.done()
    slow.state = GroupState.READY
    await asyncio.wait_for(watching, 5)
    assert "fake/0: failed" in capsys.readouterr().out


def test_with_a_log_in_json_nothing_else_is_written() -> None:
    """Standard output and error together, from the start to the end."""
    with serving("--log-format", "json", "--access-log", program=FAKE_SERVE) as server:
        assert server.complete().status_code == 200
        wait_until(lambda: "ready on" in server.output(), 20)  # which is said a moment after it answers
        assert server.stop() == 0
        records = [json.loads(line) for line in server.output().splitlines()]
    told = [record["message"] for record in records if record["logger"] == "gateway.console"]
    assert told[0].startswith("Sluice ")
    assert "sluice-demo/0: ready (100 %)" in told
    assert f"ready on {server.url}/v1 (sluice-demo; demo model); chat at {server.url}/" in told
    assert told[-1] == "stopped"
    assert {record["level"] for record in records} == {"info"}
    assert [record["path"] for record in records if record["logger"] == "gateway.access"][
        -1
    ] == "/v1/completions"
