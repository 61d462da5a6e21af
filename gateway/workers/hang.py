"""When a group hangs: the rule, apart from where its evidence comes from (pulse.py). No clock, no files.

A group that lost a process shows by the end of its socket. One that hangs keeps it open, and its heartbeat
may go on: rank 0 sends it from a thread of its own. What must move is the counter of steps in it, four
times a second even when idle. But a counter that stands may be one long step: a first long prompt, or any
step on a machine that has no time for it. So what counts is what the processes do meanwhile:

* One is stopped (state T). It will not go on by itself, whatever the group does, even while it loads. It is
  a hang when found so at every look for STOP_SECONDS: some tools stop a process for a moment.
* The counter stands and the ranks sleep: no thread of any rank runs, waits for a processor or for a disk.
  They wait for each other, or for nothing.
* The counter stands and a rank computes, for longer than the step may take: in seconds of processor, not of
  the clock. A step gets less of them on a machine under load, and that makes it no hang.

A step may take FACTOR times the longest of the group's recent ones (which is no less than their 99th
percentile), in proportion if it has more tokens than any of those; at least STALL_SECONDS, at most the
model's responseTimeout, after which nobody waits for it any more. Until a few steps have been seen it is
not known what one may take, and only sleeping tells of a hang.

Time is counted by looks, each for at most MAX_LOOK_SECONDS: a gateway that was stopped, or too busy to look,
has seen nothing meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engines.wire import Stats

LOOK_SECONDS = 0.5
MAX_LOOK_SECONDS = 2 * LOOK_SECONDS
STOP_SECONDS = 2.0
STALL_SECONDS = 4.0  # until it is found, a heartbeat and a look may pass: 5 in all
FACTOR = 5.0
ASLEEP_SHARE = 0.8  # of the looks: a rank that waits in short naps is found awake now and then
NUM_KEPT = 200  # samples of steps: one a heartbeat, or one a step if that takes longer
NUM_FIRST = 10  # samples before what a step may take is known


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a group at a moment. While it loads it has no counter, and only `stopped` counts."""

    stopped: float = 0.0  # seconds for which one of its processes has been found stopped at every look
    stood: float = 0.0  # seconds for which the counter of steps has stood
    asleep: float = 0.0  # share of the looks meanwhile that found every rank asleep
    worked: float = 0.0  # seconds of processor that the main thread of the busiest rank used meanwhile
    usual: float | None = None  # seconds that the step in progress should take at most, if known
    patience: float = 120.0  # the model's responseTimeout


def verdict(evidence: Evidence) -> str | None:
    """Why the group must be given up, one line; None: it lives, as far as can be known."""
    if evidence.stopped >= STOP_SECONDS:
        return f"one of its processes has been stopped for {evidence.stopped:.1f} s"
    limit = min(max(STALL_SECONDS, FACTOR * (evidence.usual or 0.0)), evidence.patience)
    if evidence.stood < limit:
        return None
    standing = f"no step finished for {evidence.stood:.1f} s"
    if evidence.asleep >= ASLEEP_SHARE:
        return f"{standing}, and no rank computes"
    if evidence.usual is not None and evidence.worked >= limit:
        return f"{standing}, though a rank computed for {evidence.worked:.1f} s"
    return f"{standing} (responseTimeout)" if evidence.stood >= evidence.patience else None


class StepTimes:
    """How long the group's steps take, told by the differences between its heartbeats."""

    def __init__(self) -> None:
        self._last: Stats | None = None
        self._samples: deque[tuple[float, float]] = deque(maxlen=NUM_KEPT)  # of a step: seconds, tokens

    def add(self, stats: Stats) -> None:
        """The latest heartbeat; the same one again changes nothing."""
        last, self._last = self._last, stats
        num_steps = stats.num_active_steps - last.num_active_steps if last is not None else 0
        if last is not None and num_steps:
            seconds = stats.active_seconds - last.active_seconds
            num_tokens = stats.num_computed_tokens - last.num_computed_tokens
            self._samples.append((seconds / num_steps, num_tokens / num_steps))

    def usual(self, num_tokens: int) -> float | None:
        """Seconds that a step of so many tokens should take at most; None: too few have been seen."""
        if len(self._samples) < NUM_FIRST:
            return None
        longest = max(seconds for seconds, _ in self._samples)
        return longest * max(1.0, num_tokens / max(1.0, *(tokens for _, tokens in self._samples)))


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank does at a look. `worked`: seconds of processor of its main thread, since its start."""

    is_asleep: bool
    worked: float


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a group found. `ranks` is empty and `num_signs` 0 while it loads."""

    now: float  # seconds, on a clock that only goes forward
    is_stopped: bool  # one of its processes is
    ranks: tuple[Rank, ...] = ()
    num_signs: int = 0  # messages so far that told of a step
    stats: Stats | None = None  # the last heartbeat


class Watch:
    """Gathers the evidence, look by look, over one start of a group."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._times = StepTimes()
        self._last: Look | None = None  # the one before
        self._moved: Look | None = None  # the one at which the counter was last seen to have moved
        self._stopped = self._stood = 0.0
        self._num_looks = self._num_asleep = 0  # since then

    def see(self, look: Look) -> Evidence:
        """The evidence as of `look`, the next one."""
        seconds = min(look.now - self._last.now, MAX_LOOK_SECONDS) if self._last else 0.0
        self._last = look
        self._stopped = self._stopped + seconds if look.is_stopped else 0.0
        if not look.ranks or self._moved is None or look.num_signs != self._moved.num_signs:
            self._move(look)
        else:
            self._stood += seconds
            self._num_looks += 1
            self._num_asleep += all(rank.is_asleep for rank in look.ranks)
        if look.stats is not None:
            self._times.add(look.stats)
        return self._evidence(look)

    def _move(self, look: Look) -> None:
        self._moved = look if look.ranks else None
        self._stood, self._num_looks, self._num_asleep = 0.0, 0, 0

    def _evidence(self, look: Look) -> Evidence:
        before = self._moved.ranks if self._moved else ()
        return Evidence(
            stopped=self._stopped,
            stood=self._stood,
            asleep=self._num_asleep / max(self._num_looks, 1),
            worked=max(
                (now.worked - then.worked for now, then in zip(look.ranks, before, strict=False)), default=0.0
            ),
            usual=self._times.usual(look.stats.num_step_tokens if look.stats else 0),
            patience=self._patience,
        )
