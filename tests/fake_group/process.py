"""One fake group: `python -m tests.fake_group.process RUN_DIR`, started by the guard. See the package.

With several ranks, this process stands in for torchrun: each rank has a session of its own, and when one dies
it ends them all, with code 1.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec

from engines.runtime.inbox import Inbox
from engines.runtime.leader import Leader
from engines.runtime.plan import StepPlan
from engines.runtime.scheduler import ContinuousScheduler
from engines.wire import Failed, Progress, Ready
from tests.fake_group.model import HIDDEN_SIZE, FakeRunner
from tests.fake_group.spec import VARIABLE, FakeSpec, Fault

_FOLLOWER = "follower"


def main() -> None:
    spec = msgspec.json.decode(os.environ.get(VARIABLE, "{}"), type=FakeSpec)
    _die_with_parent()
    if _FOLLOWER in sys.argv:  # a rank other than 0: it has nothing to do
        _sleep_for_ever()
    run_dir = Path(sys.argv[1])
    if spec.num_ranks > 1 and "FAKE_FOLLOWERS" not in os.environ:
        _launch(run_dir, spec.num_ranks)
    _lead(run_dir, spec)


def _launch(run_dir: Path, num_ranks: int) -> NoReturn:
    followers = [_start_rank(rank, _FOLLOWER, "[]") for rank in range(1, num_ranks)]
    _start_rank(0, str(run_dir), json.dumps([process.pid for process in followers]))
    os.wait()
    os._exit(1)  # the ranks die with their parent


def _start_rank(rank: int, argument: str, followers: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.fake_group.process", argument]
    told = {"RANK": str(rank), "FAKE_FOLLOWERS": followers, "FAKE_PARENT": str(os.getpid())}
    return subprocess.Popen(argv, env={**os.environ, **told}, start_new_session=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.environ.get("FAKE_PARENT", str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # it died before it could be said that this process shall die with it


def _lead(run_dir: Path, spec: FakeSpec) -> NoReturn:
    faults = Faults(spec.faults)
    signal.signal(signal.SIGUSR1, lambda *_: _sleep_for_ever())
    signal.signal(signal.SIGUSR2, lambda *_: _raise())
    inbox = FaultyInbox(run_dir / "gateway.sock", faults)
    try:
        inbox.send(Progress("load", 0.5))
        time.sleep(spec.load_seconds)
        faults.meet("load")
        runner = FakeRunner(spec.num_blocks, spec.block_size, spec.vocab_size, spec.step_seconds, faults.meet)
        leader = Leader(_scheduler(spec), runner, inbox, plans_in_flight=1)
        inbox.send(_ready(spec))
        leader.run()
    except Exception as error:
        inbox.send(Failed(f"{type(error).__name__}: {error}", permanent=False))
        inbox.close()
        os._exit(1)
    os._exit(0)


class FaultyInbox(Inbox):
    """The real one; a round in which it waits is an idle one."""

    def __init__(self, path: Path, faults: Faults) -> None:
        super().__init__(path)
        self._faults = faults

    def wait(self, timeout: float) -> None:
        self._faults.meet("idle")
        super().wait(timeout)


class Faults:
    """Counts the rounds of each fault's phase and lets it happen at the n-th."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self._faults = faults
        self._counts = [0] * len(faults)

    def meet(self, phase: str, plan: StepPlan | None = None) -> None:
        for index, fault in enumerate(self._faults):
            if fault.phase == phase and (fault.token is None or (plan and _has(plan, fault.token))):
                self._counts[index] += 1
                if self._counts[index] == fault.nth:
                    _happen(fault)


def _has(plan: StepPlan, token: int) -> bool:
    """Whether the plan computes a sequence whose prompt has the token."""
    assert isinstance(plan.tag, list)
    return any(token in chunk.sequence.request.prompt_ids for chunk in plan.tag)


def _happen(fault: Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(137)
        case "raise":
            _raise()
        case "memory":
            raise MemoryError("a fault was wanted")
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            _sleep_for_ever()


def _raise() -> NoReturn:
    raise RuntimeError("a fault was wanted")


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)


def _scheduler(spec: FakeSpec) -> ContinuousScheduler:
    return ContinuousScheduler(
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_model_len=spec.max_model_len,
        eos_token_ids=spec.eos_token_ids,
        prefix_cache=spec.prefix_cache,
    )


def _ready(spec: FakeSpec) -> Ready:
    return Ready(
        engine="fake",
        dtype="float32",
        device="cpu",
        tp_size=spec.num_ranks,
        pp_size=1,
        max_model_len=min(spec.max_model_len, spec.num_blocks * spec.block_size),
        max_num_seqs=spec.max_num_seqs,
        vocab_size=spec.vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        eos_token_ids=list(spec.eos_token_ids),
        fingerprint=spec.fingerprint,
        load_seconds=spec.load_seconds,
        pids=[os.getpid(), *json.loads(os.environ.get("FAKE_FOLLOWERS", "[]"))],
    )


if __name__ == "__main__":
    main()
