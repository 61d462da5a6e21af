"""How far a start is."""

from __future__ import annotations

from engines.wire import Progress
from gateway.workers.progress import overall_percent, phase
from gateway.workers.protocol import GroupState
from tests.fakes import FakeGroup, ready


def group(state: GroupState, progress: Progress | None = None) -> FakeGroup:
    return FakeGroup(says=[], info=ready(10), state=state, progress=progress)


def test_the_percentage_never_goes_back_over_a_start() -> None:
    steps = [
        None,
        *(
            Progress(phase, f)
            for phase in ("connect", "compile", "load", "allocate", "warmup")
            for f in (0, 0.5, 1)
        ),
    ]
    percents = [overall_percent(group(GroupState.STARTING, step)) for step in steps]
    assert percents == sorted(percents)
    assert percents[0] == 0
    assert percents[-1] == overall_percent(group(GroupState.READY)) == 100


def test_a_start_has_a_phase_from_its_beginning() -> None:
    assert phase(group(GroupState.STARTING)) == "start"
    assert phase(group(GroupState.STARTING, Progress("load", 0.2))) == "load"
    assert phase(group(GroupState.READY)) is None
