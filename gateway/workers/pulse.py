"""What a group's processes do, as the system's /proc shows it: the evidence for hang.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from engines.guard import descendants
from gateway.workers.hang import Rank

_AWAKE = frozenset("RD")  # runs or waits for a processor; waits for a disk
_STOPPED = "T"  # by a signal; not "t", which is a debugger's
_TICKS = os.sysconf("SC_CLK_TCK")
_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class _Thread:
    state: str
    worked: float  # seconds of processor, its own
    started: int  # with its id, what tells it from a later one


class Pulse:
    """The processes below a guard, and the guard."""

    def __init__(self, guard: int) -> None:
        self._guard = guard
        self._known: dict[int, int] = {}  # process to when it started: all of a group that has loaded

    def is_any_stopped(self, has_loaded: bool) -> bool:
        """Whether one of them is stopped. Of a group that has loaded, those that it had then are looked at:
        to walk the tree again would take milliseconds."""
        if not has_loaded:
            return any(thread.state == _STOPPED for _, thread in self._walk())
        if not self._known:
            self._known = {pid: thread.started for pid, thread in self._walk()}
        found = ((started, _main_thread(pid)) for pid, started in self._known.items())
        return any(t is not None and t.started == started and t.state == _STOPPED for started, t in found)

    def _walk(self) -> Iterator[tuple[int, _Thread]]:
        for pid in (self._guard, *descendants(self._guard)):
            if (thread := _main_thread(pid)) is not None:
                yield pid, thread


def ranks(pids: Sequence[int], closely: bool) -> tuple[Rank, ...]:
    """What each rank does. To tell that it sleeps takes a look at all its threads: not without `closely`."""
    return tuple(_rank(pid, closely) for pid in pids)


def _rank(pid: int, closely: bool) -> Rank:
    main = _main_thread(pid)
    is_asleep = closely and not any(thread.state in _AWAKE for thread in _threads(pid))
    return Rank(is_asleep, main.worked if main is not None else 0.0)


def _threads(pid: int) -> Iterator[_Thread]:
    with suppress(*_GONE):
        for thread in os.listdir(f"/proc/{pid}/task"):
            if (found := _thread(pid, thread)) is not None:
                yield found


def _main_thread(pid: int) -> _Thread | None:
    return _thread(pid, str(pid))


def _thread(pid: int, thread: str) -> _Thread | None:
    """None: it is gone."""
    with suppress(*_GONE):
        # Not by pathlib, which puts each part of a path into Python's table of interned strings: read several
        # times a second, that table is full after half an hour and doubles, by a MiB.
        with open(f"/proc/{pid}/task/{thread}/stat") as file:
            text = file.read()
        fields = text.rpartition(")")[2].split()  # from the third on: its name may hold anything
        return _Thread(fields[0], (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[19]))
    return None
