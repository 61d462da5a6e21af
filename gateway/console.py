"""What `sluice serve` tells on standard output: lines, and on a terminal a bar while the groups load.

With a log in JSON they are records of that instead, so that both streams together are JSON."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from gateway.logs import LogFormat
from gateway.workers.progress import COMPILE, overall_percent, phase
from gateway.workers.protocol import GroupState, WorkerGroup

if TYPE_CHECKING:
    from rich.progress import TaskID

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05

Tell = Callable[[str], None]


def teller(log_format: LogFormat) -> Tell:
    """What tells users a line."""

    def tell(line: str) -> None:
        if log_format == "json":
            log.info(line.strip())
        else:
            print(line, flush=True)

    return tell


class Display(Protocol):
    """Shows one group's progress."""

    def show(self, group: WorkerGroup, percent: int, note: str) -> None: ...


async def watch(groups: Sequence[WorkerGroup], display: Display) -> None:
    """Show every group's progress until each is ready, or failed for good."""
    while True:
        for group in groups:
            display.show(group, overall_percent(group), note(group))
        if all(is_settled(group) for group in groups):
            return
        await asyncio.sleep(_LOOK_SECONDS)


def is_settled(group: WorkerGroup) -> bool:
    return group.state not in (GroupState.STARTING, GroupState.RESTARTING)


def note(group: WorkerGroup) -> str:
    """What a group is doing, in a word. Why one died or failed is said by the log, or at the end."""
    if phase(group) == COMPILE:
        return "compile: only this once, a minute or more"
    return phase(group) or ("died" if group.state is GroupState.RESTARTING else str(group.state))


class PlainDisplay:
    """A line whenever what a group is doing changes."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last: dict[str, str] = {}

    def show(self, group: WorkerGroup, percent: int, note: str) -> None:
        if self._last.get(group.name) != note:
            self._last[group.name] = note
            self._tell(f"{group.name}: {note} ({percent} %)")


class BarDisplay:
    """A bar for each group."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, group: WorkerGroup, percent: int, note: str) -> None:
        if group.name not in self._tasks:
            self._tasks[group.name] = self.progress.add_task("", total=100, name=group.name, note=note)
        self.progress.update(self._tasks[group.name], completed=percent, note=note)


@contextmanager
def display(log_format: LogFormat) -> Iterator[Display]:
    """The display that fits standard output, and the log."""
    if log_format == "json" or not sys.stdout.isatty():
        yield PlainDisplay(teller(log_format))
        return
    bars = BarDisplay()
    with bars.progress:
        yield bars
