"""The rule that tells a hang from a slow step, over evidence; and the evidence, over real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.wire import Stats
from gateway.workers.hang import (
    FACTOR,
    LOOK_SECONDS,
    NUM_FIRST,
    STALL_SECONDS,
    STOP_SECONDS,
    Evidence,
    Look,
    Rank,
    StepTimes,
    Watch,
    verdict,
)
from gateway.workers.pulse import Pulse, ranks
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (Evidence(stopped=2.0), "has been stopped for 2.0 s"),  # also while it loads
        (Evidence(stood=4.0, asleep=1.0), "no step finished for 4.0 s, and no rank computes"),
        (Evidence(stood=4.5, asleep=0.9, worked=0.4, usual=0.2), "no rank computes"),
        (Evidence(stood=10.0, asleep=1.0, usual=2.0), "no rank computes"),
        (Evidence(stood=4.0, worked=4.0, usual=0.1), "though a rank computed for 4.0 s"),
        (Evidence(stood=15.0, worked=15.0, usual=3.0), "though a rank computed for 15.0 s"),
        (Evidence(stood=120.0, worked=119.0), "responseTimeout"),
        (Evidence(stood=1.0, worked=1.0, asleep=0.1, patience=1.0), "responseTimeout"),
        (Evidence(stood=60.0, asleep=1.0, usual=500.0, patience=60.0), "no rank computes"),
    ],
)
def test_a_hang(evidence: Evidence, words: str) -> None:
    assert words in (verdict(evidence) or "")


@pytest.mark.parametrize(
    "evidence",
    [
        Evidence(),
        Evidence(stopped=1.9),  # a tool that stops processes for a moment
        Evidence(stood=3.9, asleep=1.0, usual=0.01),
        Evidence(stood=9.9, asleep=1.0, usual=2.0),  # a device computes while the host sleeps
        Evidence(stood=119.0, worked=119.0),  # the first steps: what they may take is not known
        Evidence(stood=30.0, worked=3.9, asleep=0.0, usual=0.1),  # starved: it hardly gets to compute
        Evidence(stood=30.0, worked=20.0, usual=6.0),
        Evidence(stood=100.0, worked=0.0, asleep=0.7, usual=0.1),  # of its threads, some do
    ],
)
def test_no_hang(evidence: Evidence) -> None:
    assert verdict(evidence) is None


def heartbeats(*steps: tuple[float, int]) -> Iterator[Stats]:
    """One after each step, of so many seconds and tokens."""
    seconds, num_tokens = 0.0, 0
    yield Stats(num_steps=0)
    for number, (step_seconds, step_tokens) in enumerate(steps, 1):
        seconds, num_tokens = seconds + step_seconds, num_tokens + step_tokens
        yield Stats(
            num_steps=number,
            num_active_steps=number,
            active_seconds=seconds,
            num_computed_tokens=num_tokens,
        )


def times_of(*steps: tuple[float, int]) -> StepTimes:
    times = StepTimes()
    for stats in heartbeats(*steps):
        times.add(stats)
        times.add(stats)  # the same one is looked at more than once
    return times


def test_what_a_step_may_take_is_not_known_at_first() -> None:
    assert times_of(*[(1.0, 1)] * (NUM_FIRST - 1)).usual(1) is None
    assert times_of(*[(1.0, 1)] * NUM_FIRST).usual(1) == 1.0


def test_the_longest_of_the_recent_steps_counts_and_a_larger_one_may_take_more() -> None:
    times = times_of(*[(0.25, 8)] * 20, (2.0, 512), *[(0.25, 8)] * 20)
    assert [times.usual(n) for n in (0, 1, 512, 2048)] == [2.0, 2.0, 2.0, 8.0]


def test_decoding_alone_tells_of_a_prompt_by_proportion() -> None:
    assert times_of(*[(0.125, 1)] * 50).usual(512) == 64.0


def test_what_is_long_ago_is_forgotten() -> None:
    assert times_of((9.0, 512), *[(0.25, 8)] * 200).usual(8) == 0.25


def test_idle_rounds_are_no_steps() -> None:
    times = times_of(*[(0.5, 4)] * NUM_FIRST)
    last = list(heartbeats(*[(0.5, 4)] * NUM_FIRST))[-1]
    for number in range(500):
        times.add(
            Stats(
                num_steps=last.num_steps + number,
                num_active_steps=last.num_active_steps,
                active_seconds=last.active_seconds,
                num_computed_tokens=last.num_computed_tokens,
            )
        )
    assert times.usual(4) == 0.5


class Looks:
    """Look after look at a group of two ranks, whose counter stands unless `moves`."""

    def __init__(self, patience: float = 120.0) -> None:
        self.watch = Watch(patience)
        self.now, self.num_signs, self.worked = 100.0, 1, 5.0

    def __call__(
        self,
        count: int = 1,
        *,
        every: float = LOOK_SECONDS,
        moves: bool = False,
        is_asleep: bool = False,
        share: float = 0.0,
        is_stopped: bool = False,
    ) -> Evidence:
        """`share` of the time of one processor goes to the busier rank."""
        for _ in range(count):
            self.now += every
            self.num_signs += moves
            self.worked += share * every
            both = (Rank(True, 7.0), Rank(is_asleep, self.worked))
            evidence = self.watch.see(Look(self.now, is_stopped, both, self.num_signs))
        return evidence


def test_a_counter_that_moves_is_a_life() -> None:
    evidence = Looks()(50, moves=True, is_asleep=True)
    assert (evidence.stood, evidence.asleep, evidence.worked) == (0.0, 0.0, 0.0)


def test_from_its_last_move_on_is_counted() -> None:
    look = Looks()
    look(10, moves=True, share=1.0)
    evidence = look(6, share=0.5, is_asleep=True)
    assert (evidence.stood, evidence.asleep, evidence.worked) == (3.0, 1.0, 1.5)
    assert look(2).asleep == 0.75
    assert look(moves=True).stood == 0.0


def test_all_ranks_must_sleep() -> None:
    look = Looks()
    look(moves=True)
    assert look(10, is_asleep=False).asleep == 0.0


def test_a_gateway_that_was_stopped_has_seen_nothing() -> None:
    look = Looks()
    look(moves=True)
    assert verdict(look(1, every=300.0, is_asleep=True)) is None
    assert look(1, every=300.0, is_asleep=True).stood == 2.0
    assert look(1, is_stopped=True, every=300.0).stopped < STOP_SECONDS


def test_stopped_means_at_every_look() -> None:
    look = Looks()
    look(4, is_stopped=True)
    look(1, is_stopped=False)
    assert verdict(look(3, is_stopped=True)) is None
    assert verdict(look(1, is_stopped=True)) is not None


def test_while_it_loads_only_a_stop_counts() -> None:
    watch = Watch(patience=10.0)
    for second in range(100):
        assert verdict(watch.see(Look(float(second), False))) is None
    for second in range(100, 102):
        evidence = watch.see(Look(float(second), True))
    assert verdict(evidence) is not None


def test_both_kinds_of_standing_are_found_within_five_seconds() -> None:
    for how in ({"is_asleep": True}, {"share": 1.0}):
        look = Looks()
        for stats in heartbeats(*[(0.02, 8)] * 30):
            ranks_now = (Rank(False, 7.0), Rank(False, 5.0))
            look.watch.see(Look(look.now, False, ranks_now, look.num_signs + stats.num_steps, stats))
        look.num_signs += stats.num_steps
        num_looks = 1
        while verdict(look(**how)) is None:  # type: ignore[arg-type]
            num_looks += 1
        assert num_looks * LOOK_SECONDS + 0.5 <= 5.0  # the last heartbeat may have come half a second late


def test_the_limit_follows_the_groups_own_steps() -> None:
    assert verdict(Evidence(stood=FACTOR * 2 - 0.1, asleep=1.0, usual=2.0)) is None
    assert verdict(Evidence(stood=FACTOR * 2, asleep=1.0, usual=2.0)) is not None
    assert verdict(Evidence(stood=STALL_SECONDS, asleep=1.0, usual=0.001)) is not None


# What processes do: real ones.

SLEEPS = "import time; time.sleep(1000)"
NAPS = "import time\nwhile True: time.sleep(0.0001)"
SPINS = "while True: pass"
THREAD_SPINS = "import hashlib, threading\nb = bytes(1 << 24)\n" + (
    "def f():\n while True: hashlib.sha256(b)\nthreading.Thread(target=f).start(); threading.Event().wait()"
)


@contextmanager
def process(code: str) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE
    ) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        try:
            yield popen.pid
        finally:
            popen.kill()


def share_asleep(pid: int, num_looks: int = 50) -> float:
    found = []
    for _ in range(num_looks):
        time.sleep(0.01)
        found.append(ranks([pid], closely=True)[0].is_asleep)
    return sum(found) / num_looks


@pytest.mark.parametrize(
    ("code", "low", "high"), [(SLEEPS, 1.0, 1.0), (SPINS, 0.0, 0.0), (THREAD_SPINS, 0.0, 0.2)]
)
def test_what_a_process_does(code: str, low: float, high: float) -> None:
    with process(code) as pid:
        time.sleep(0.2)
        assert low <= share_asleep(pid) <= high


def test_nobody_is_asleep_at_a_glance() -> None:
    with process(SLEEPS) as pid:
        assert ranks([pid, pid], closely=False) == ranks([pid], closely=False) * 2
        assert not ranks([pid], closely=False)[0].is_asleep


def test_processor_seconds_are_those_of_the_main_thread() -> None:
    with process(SPINS) as spinning, process(THREAD_SPINS) as waiting:
        before = ranks([spinning, waiting], closely=False)
        wait_until(lambda: ranks([spinning], closely=False)[0].worked > before[0].worked + 0.3, 30.0)
        assert ranks([waiting], closely=False)[0].worked - before[1].worked < 0.1


def test_a_rank_that_is_gone_sleeps() -> None:
    with process(SLEEPS) as pid:
        pass
    assert ranks([pid], closely=True) == (Rank(True, 0.0),)


@pytest.mark.parametrize("has_loaded", [False, True])
def test_a_stopped_process_is_found_at_any_depth(has_loaded: bool) -> None:
    start = f"subprocess.Popen([sys.executable, '-c', {SLEEPS!r}])"
    code = f"import subprocess, sys\np = {start}\nprint(p.pid, flush=True)\np.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        child = int(popen.stdout.readline())
        pulse = Pulse(popen.pid)
        assert not pulse.is_any_stopped(has_loaded)
        for pid in (child, popen.pid):
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: pulse.is_any_stopped(has_loaded), 30.0)
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: not pulse.is_any_stopped(has_loaded), 30.0)
        os.kill(child, signal.SIGKILL)
        popen.wait()
        assert not pulse.is_any_stopped(has_loaded)


def test_a_look_interns_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at several times a second must not fill the table of interned strings."""
    interned: list[str] = []

    def intern(text: str) -> str:
        interned.append(text)
        return text

    monkeypatch.setattr(sys, "intern", intern)
    Path(f"/proc/{os.getpid()}/stat").read_text()
    assert interned  # as pathlib does
    interned.clear()
    pulse = Pulse(os.getpid())
    assert not pulse.is_any_stopped(has_loaded=True)  # the first time it walks the tree
    interned.clear()
    assert ranks([os.getpid()], closely=True)
    assert not pulse.is_any_stopped(has_loaded=True)
    assert interned == []
