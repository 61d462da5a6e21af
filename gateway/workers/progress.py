"""How far a start is, as the console and /readyz both say it."""

from __future__ import annotations

from gateway.workers.protocol import GroupState, WorkerGroup

START = "start"  # the processes start, and have said nothing yet
COMPILE = "compile"  # what an engine needs and the machine does not have yet: once, for all later starts
_PHASES = ("connect", COMPILE, "load", "allocate", "warmup")
_SHARES = (0.0, 0.05, 0.1, 0.8, 0.85, 1.0)  # of the whole, where each phase begins; the last is the end


def phase(group: WorkerGroup) -> str | None:
    """What a group that is STARTING does; None in every other state."""
    if group.state is not GroupState.STARTING:
        return None
    return group.progress.phase if group.progress else START


def overall_percent(group: WorkerGroup) -> int:
    """How far a start is, all phases together, 0 to 100."""
    if group.state is GroupState.READY:
        return 100
    if group.progress is None or group.progress.phase not in _PHASES:
        return 0
    index = _PHASES.index(group.progress.phase)
    low, high = _SHARES[index], _SHARES[index + 1]
    return round(100 * (low + (high - low) * group.progress.fraction))
