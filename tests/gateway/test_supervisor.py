"""Starting, watching, restarting and ending groups: the real guard over FakeWorker processes, and kills."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from pathlib import Path

import psutil
import pytest

from engines.guard import SHARED_MEMORY
from gateway.workers import life
from gateway.workers.backoff import backoff_seconds, retry_after
from gateway.workers.group import Group
from gateway.workers.lastwords import describe_exit, last_words
from gateway.workers.life import GroupSpec
from gateway.workers.process import Command
from gateway.workers.protocol import GroupState, WorkerLost, WorkerUnavailable
from gateway.workers.rundir import remove_stale, run_directory
from gateway.workers.supervisor import Supervisor
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
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio
REPO = Path(__file__).parents[2]
ENDLESS = 4000
TWO_RANKS = Behaviour(num_ranks=2)


_left_by_others: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _know_what_others_left() -> None:
    """A resource tracker, renderers of templates: they end with the session."""
    _left_by_others.clear()
    _left_by_others.update(psutil.Process(os.getpid()).children(recursive=True))


def descendants() -> list[psutil.Process]:
    """All that this test has started."""
    return [
        child
        for child in psutil.Process(os.getpid()).children(recursive=True)
        if child not in _left_by_others
    ]


def guard_of() -> psutil.Process:
    (guard,) = (child for child in descendants() if "engines.guard" in child.cmdline())
    return guard


def shared_memory() -> list[Path]:
    """What groups of this process have there: their names carry its pid."""
    return list(SHARED_MEMORY.glob(f"*sluice-{os.getpid()}-*"))


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def rank_0(group: Group) -> int:
    assert group.info is not None
    return group.info.pids[0]


def rank_1(group: Group) -> int:
    assert group.info is not None
    return group.info.pids[1]


def launcher(_: Group) -> int:
    (child,) = [each for each in guard_of().children() if "fake_worker.py" in " ".join(each.cmdline())]
    return child.pid


def guard(_: Group) -> int:
    return guard_of().pid


async def test_a_group_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(TWO_RANKS)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        (run_dir,) = (tmp_path / "t").iterdir()
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in run_dir.iterdir()] == ["launch.json"]  # the socket's path is gone
        assert list(SHARED_MEMORY.glob(f"{run_dir.name}*")) != []
        assert len(descendants()) == 4  # guard, launcher, two ranks
    assert descendants() == []
    assert list(SHARED_MEMORY.glob(f"{run_dir.name}*")) == []


@pytest.mark.parametrize("victim", [rank_0, rank_1, launcher, guard])
async def test_any_death_ends_the_streams_and_the_group_serves_again(
    tmp_path: Path, victim: Callable[[Group], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(life.log, "info", lambda message, *values: said.append(message % values))
    async with supervised(tmp_path, fake_group(TWO_RANKS)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        before = descendants()
        stream, other = group.generate(request(ENDLESS)), group.generate(request(ENDLESS))
        await anext(stream)
        os.kill(victim(group), signal.SIGKILL)
        async with asyncio.timeout(2):
            with pytest.raises(WorkerLost):
                await read(stream)
            with pytest.raises(WorkerLost):
                await read(other)
        told = [line for line in said if "died with" in line]
        assert [line.split(";")[0] for line in told] == [f"{group.name}: died with 2 sequences in it"]
        with pytest.raises(WorkerUnavailable) as refusal:
            group.generate(request())
        assert refusal.value.retry_after >= 1
        await until(lambda: group.num_restarts == 1 and group.state is GroupState.READY)
        assert [process for process in before if not is_gone(process.pid)] == []
        assert await read(group.generate(request(4))) == [1, 2, 3, 1]


async def test_thirty_kills_in_a_row(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        for number in range(30):
            await until(lambda n=number: group.num_restarts == n and group.state is GroupState.READY)  # type: ignore[misc]
            stream = group.generate(request(ENDLESS))
            await anext(stream)
            os.kill(rank_0(group), signal.SIGKILL)
            async with asyncio.timeout(2):
                with pytest.raises(WorkerLost):
                    await read(stream)
            assert group.num_outstanding == 0
        await until(lambda: group.num_restarts == 30 and group.state is GroupState.READY)
        assert await read(group.generate(request(2))) == [1, 2]
        assert len(descendants()) == 2
    assert descendants() == []
    assert shared_memory() == []


async def test_a_permanent_failure_is_not_tried_again(tmp_path: Path) -> None:
    spec = fake_group(Behaviour(fail="vocab_size 7 is odd", fail_permanently=True))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.state is GroupState.FAILED)
        assert group.failure == "vocab_size 7 is odd"
        assert group.num_restarts == 0
        assert descendants() == []
        with pytest.raises(WorkerUnavailable, match="failed: vocab_size 7 is odd"):
            group.generate(request())


async def test_a_permanent_failure_never_looks_like_a_restart(tmp_path: Path) -> None:
    spec, states = fake_group(Behaviour(fail="no such model", fail_permanently=True)), set()
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        while group.state is not GroupState.FAILED:
            states.add((group.state, group.failure))
            await asyncio.sleep(0)
    assert states == {(GroupState.STARTING, None)}


async def test_what_could_be_loaded_once_is_tried_again(tmp_path: Path) -> None:
    """A file system that is away for a moment: no start can succeed, and yet the next one does."""
    away = Behaviour(fail="holds no model", fail_permanently=True)
    starts = chain([Behaviour(die_at_step=1), away, away], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        with pytest.raises(WorkerLost):
            await read(group.generate(request()))
        await until(lambda: group.failure == "holds no model")
        await until_ready(group)
        assert group.num_restarts == 3


async def test_a_failed_group_is_started_when_somebody_asks(tmp_path: Path) -> None:
    starts = chain([Behaviour(fail="no such model", fail_permanently=True)] * 2, repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        for num_restarts in range(2):
            await until(lambda: group.state is GroupState.FAILED)
            assert group.num_restarts == num_restarts
            assert group.restart("a test")
            await until(lambda: group.state is not GroupState.FAILED)
        await until_ready(group)
        assert await read(group.generate(request(2))) == [1, 2]


async def test_a_rank_that_misses_another_does_not_say_why(tmp_path: Path) -> None:
    starts = chain([Behaviour(fail="gloo: Connection closed by peer")], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        failures = set()
        while group.state is not GroupState.READY:
            failures.add(group.failure)
            await asyncio.sleep(0)
    assert not [failure for failure in failures if failure and "peer" in failure]
    assert [failure for failure in failures if failure and f"logs: {tmp_path}" in failure]


async def test_a_failure_at_load_is_tried_again(tmp_path: Path) -> None:
    starts = chain([Behaviour(fail="no memory"), Behaviour(crash="broken shard")], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.failure == "no memory")
        await until(lambda: "RuntimeError: broken shard" in (group.failure or ""))
        await until_ready(group)
        assert group.num_restarts == 2
        assert group.failure is None


async def test_failing_for_too_long_is_final(tmp_path: Path) -> None:
    config = fake_config().model_copy(update={"max_retry_timeout": 0.2})
    async with supervised(tmp_path, fake_group(Behaviour(fail="no memory"), config)) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.state is GroupState.FAILED)
        assert "maxRetryTimeoutInSec" in (group.failure or "")
        assert "no memory" in (group.failure or "")


async def test_what_cannot_be_started(tmp_path: Path) -> None:
    command = Command((sys.executable, "-m", "engines.guard", "x" * 9, "--", "/no/such"), os.environ)
    spec = GroupSpec("fake/0", fake_config(), lambda *_: command)
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.num_restarts > 1)
        await until(lambda: "cannot start /no/such: No such file" in (group.failure or ""))


async def test_no_guard_to_start(tmp_path: Path) -> None:
    spec = GroupSpec("fake/0", fake_config(), lambda *_: Command(("/no/such/python",), {}))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.num_restarts > 1)
        assert "/no/such/python" in (group.failure or "")


async def test_a_start_that_takes_too_long(tmp_path: Path) -> None:
    starts = chain([Behaviour(load_seconds=60)], repeat(Behaviour()))
    spec = changing_group(starts, fake_config(startup_timeout=1.0))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.failure is not None)
        assert group.failure == "not ready within startupTimeout, 1 s (in load, at 0%)"
        await until_ready(group)


async def test_compiling_is_not_counted_as_starting(tmp_path: Path) -> None:
    spec = changing_group(repeat(Behaviour(compile_seconds=3)), fake_config(startup_timeout=2.0))
    async with supervised(tmp_path, spec) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.progress is not None and group.progress.phase == "compile")
        await until_ready(group)
        assert group.num_restarts == 0


async def test_a_counter_that_stands_is_a_hang(tmp_path: Path) -> None:
    starts = chain([Behaviour(hang_at_step=3)], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        got: list[int] = []
        with pytest.raises(WorkerLost, match=r"hangs: no step finished for .* s, and no rank computes"):
            await read(group.generate(request(ENDLESS)), into=got)
        assert got == [1, 2, 3]
        assert group.stats is not None  # the heartbeat went on
        await until(lambda: group.num_restarts == 1 and group.state is GroupState.READY)


@pytest.mark.parametrize("victim", [rank_0, rank_1, launcher, guard])
async def test_a_stopped_process_is_a_hang_though_nothing_runs(
    tmp_path: Path, victim: Callable[[Group], int]
) -> None:
    async with supervised(tmp_path, fake_group(TWO_RANKS)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        before, started = descendants(), time.monotonic()
        os.kill(pid := victim(group), signal.SIGSTOP)
        await until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        await until(lambda: group.state is not GroupState.READY)
        assert time.monotonic() - started > 1.5  # a moment's stop would have been none
        assert "hangs: one of its processes has been stopped" in (group.failure or "")
        await until(lambda: group.num_restarts == 1 and group.state is GroupState.READY)
        assert [process for process in before if not is_gone(process.pid)] == []


async def test_a_process_stopped_while_it_loads_is_a_hang(tmp_path: Path) -> None:
    starts = chain([Behaviour(load_seconds=60)], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until(lambda: group.progress)
        (child,) = guard_of().children()
        child.suspend()
        await until(lambda: "hangs: one of its processes has been stopped" in (group.failure or ""))
        await until_ready(group)


async def test_a_moments_stop_and_a_gateway_that_does_not_look_are_no_hang(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(TWO_RANKS)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        reading = asyncio.create_task(read(group.generate(request(ENDLESS))))
        os.kill(rank_0(group), signal.SIGSTOP)
        await asyncio.sleep(1.0)
        os.kill(rank_0(group), signal.SIGCONT)
        time.sleep(7)  # noqa: ASYNC251  the event loop stands, and nobody reads what the group sends
        await asyncio.sleep(1.2)
        assert group.state is GroupState.READY
        assert len(await reading) == ENDLESS
        assert group.num_restarts == 0


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.005, 0.02])
async def test_leaving_while_a_dead_group_still_ends(tmp_path: Path, delay: float) -> None:
    """Warnings are errors here: a guard that nobody waits for warns when it is forgotten."""
    async with supervised(tmp_path, fake_group(Behaviour(num_ranks=2, fail="no memory"))) as supervisor:
        await until(lambda: supervisor.groups[0].state is GroupState.RESTARTING)
        await asyncio.sleep(delay)
    assert descendants() == []
    gc.collect()


async def test_babble_ends_the_group(tmp_path: Path) -> None:
    starts = chain([Behaviour(babble_at_step=2)], repeat(Behaviour()))
    async with supervised(tmp_path, changing_group(starts)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        with pytest.raises(WorkerLost, match="malformed"):
            await read(group.generate(request()))
        await until(lambda: group.num_restarts == 1 and group.state is GroupState.READY)


async def test_draining_lets_what_runs_finish(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(Behaviour(step_seconds=0.01))) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        reading = asyncio.create_task(read(group.generate(request(30))))
        await asyncio.sleep(0.02)
        await supervisor.stop(grace_seconds=20)
        assert group.state is GroupState.STOPPED
        assert descendants() == []
        assert len(await reading) == 30


async def test_the_grace_ends(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        reading = asyncio.create_task(read(group.generate(request(ENDLESS))))
        await asyncio.sleep(0.02)
        await supervisor.stop(grace_seconds=0.05)
        with pytest.raises(WorkerLost, match="stopped"):
            await reading
        assert descendants() == []


async def test_a_cancelled_stop_still_ends_everything(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group()) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        stream = group.generate(request(ENDLESS))
        stopping = asyncio.create_task(supervisor.stop(grace_seconds=60))
        await asyncio.sleep(0.02)
        stopping.cancel()
        await asyncio.wait([stopping])
        assert descendants() == []
        with pytest.raises(WorkerLost):
            await read(stream)


@pytest.mark.parametrize("loading", [True, False])
async def test_stopping_before_ready(tmp_path: Path, loading: bool) -> None:
    async with supervised(tmp_path, fake_group(Behaviour(load_seconds=60))) as supervisor:
        if loading:
            await until(lambda: supervisor.groups[0].progress)
        else:
            await asyncio.sleep(0)
    assert descendants() == []


async def test_a_mistake_in_the_supervisor_is_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def command(run_dir: Path, log_dir: Path) -> Command:
        raise KeyError("devices")

    with caplog.at_level(logging.CRITICAL):
        async with supervised(tmp_path, GroupSpec("fake/0", fake_config(), command)) as supervisor:
            (group,) = supervisor.groups
            await until(lambda: group.state is GroupState.FAILED)
            assert "devices" in (group.failure or "")


async def test_logs_of_old_starts_are_thrown_away(tmp_path: Path) -> None:
    async with supervised(tmp_path, fake_group(Behaviour(fail="no"))) as supervisor:
        await until(lambda: supervisor.groups[0].num_restarts >= 12)
    kept = sorted(int(path.name) for path in (tmp_path / "logs" / "fake_0").iterdir())
    assert len(kept) == 10
    assert kept[-1] >= 13


def start_gateway(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    argv = [
        sys.executable,
        "-m",
        "tests.gateway.gateway_process",
        str(tmp_path / "t"),
        str(tmp_path / "logs"),
    ]
    gateway = subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    pids: list[int] = json.loads(gateway.stdout.readline())
    assert len(pids) == 4
    return gateway, pids


def test_ten_killed_gateways_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for _ in range(10):
        gateway, pids = start_gateway(tmp_path)
        (run_dir,) = (tmp_path / "t").iterdir()
        with gateway:
            gateway.kill()
        wait_until(lambda p=pids: all(map(is_gone, p)), 3.0)  # type: ignore[misc]
        wait_until(lambda: not list((tmp_path / "t").iterdir()), 3.0)
        assert list(SHARED_MEMORY.glob(f"*{run_dir.name}*")) == []


def test_gateway_and_guard_killed_leave_no_process_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    gateway, pids = start_gateway(tmp_path)
    guard_pid = next(pid for pid in pids if "engines.guard" in psutil.Process(pid).cmdline())
    with gateway:
        gateway.send_signal(signal.SIGSTOP)  # it shall not see to its guard
        os.kill(guard_pid, signal.SIGKILL)
        gateway.kill()
    wait_until(lambda: all(map(is_gone, pids)), 3.0)
    (left,) = (tmp_path / "t").iterdir()
    assert remove_stale(tmp_path / "t") == [left]
    assert list((tmp_path / "t").iterdir()) == []
    assert list(SHARED_MEMORY.glob(f"{left.name}*")) == []


def test_only_what_dead_gateways_left_is_stale(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"sluice-{dead.pid}-abcd1234", f"sluice-{dead.pid}-notours", f"other-{dead.pid}-abcd1234"):
        (tmp_path / name).mkdir()
    (tmp_path / f"sluice-{dead.pid}-link1234").symlink_to(tmp_path)
    with run_directory(tmp_path) as alive:
        assert remove_stale(tmp_path) == [tmp_path / f"sluice-{dead.pid}-abcd1234"]
        assert alive.is_dir()
    assert not alive.exists()


def test_backoff() -> None:
    assert [backoff_seconds(number) for number in range(1, 13)] == [0, 1, 1, 2, 3, 5, 8, 13, 21, 30, 30, 30]


@pytest.mark.parametrize(("seconds", "expected"), [(-5.0, 1), (0.2, 1), (1.2, 2), (1e6, 60)])
def test_retry_after(seconds: float, expected: int) -> None:
    assert retry_after(100.0 + seconds, 100.0) == expected


@pytest.mark.parametrize(
    ("code", "words"),
    [(137, "ended by SIGKILL"), (-9, "ended by SIGKILL"), (1, "ended with code 1"), (0, "code 0")],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)


def write_logs(directory: Path, texts: Iterable[tuple[str, str]]) -> None:
    for age, (name, text) in enumerate(texts):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(age, age))


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{}\n'


ECHO = (
    "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:5329: Connection reset by peer. 🏖️"
)
CLOSING = (
    "W1121 07:55:45.887000 20770 elastic/multiprocessing/api.py:1028] Sending process 2 closing signal\n"
)
FAILED = (
    "E1121 07:55:45.889000 20770 api.py:1002] failed (exitcode: {code}) local_rank: 1 (pid: 3) of binary\n"
)
TABLE = """\
ChildFailedError:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 2)  (SIGTERM)
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 3)  (SIGKILL)
"""


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], None),
        ([("a_0/attempt_0/0/stderr.log", "all is well\n")], None),
        (
            [
                ("a_0/attempt_0/1/stderr.log", TRACEBACK.format("ValueError: first") + "bye\n"),
                ("a_0/attempt_0/0/stderr.log", TRACEBACK.format("EOFError: a consequence")),
                ("launcher.log", TRACEBACK.format("ChildFailedError:")),
            ],
            "ValueError: first",
        ),
        (
            [("a_0/attempt_0/0/stderr.log", "x\nFatal Python error: Segmentation fault\n\nCurrent thread")],
            "Fatal Python error: Segmentation fault",
        ),
        ([("launcher.log", "python: No module named torch\n")], "python: No module named torch"),
        ([("launcher.log", "ChildFailedError:\n====\nnothing to see\n")], None),
        ([("launcher.log", CLOSING)], None),
        ([("launcher.log", "2026-11-21 14:58:04,061 rank 0 INFO ready: Ready(engine='accelerate')\n")], None),
        (
            [
                ("a_0/attempt_0/0/stderr.log", TRACEBACK.format(ECHO)),
                ("launcher.log", CLOSING + FAILED.format(code=-9)),
            ],
            "rank 1 was ended by SIGKILL",
        ),
        ([("launcher.log", CLOSING + TABLE)], "rank 1 was ended by SIGKILL"),
        (
            [
                ("a_0/attempt_0/0/stderr.log", TRACEBACK.format(ECHO)),
                ("a_0/attempt_0/1/stderr.log", TRACEBACK.format("ValueError: its own")),
                ("launcher.log", CLOSING + FAILED.format(code=1)),
            ],
            "ValueError: its own",
        ),
        (
            [("a_0/attempt_0/0/stderr.log", TRACEBACK.replace("\n", "\n[rank0]: ").format(ECHO))],
            "a rank was lost: the others lost the connection to it",
        ),
    ],
)
def test_last_words(tmp_path: Path, texts: list[tuple[str, str]], expected: str | None) -> None:
    write_logs(tmp_path, texts)
    assert last_words(tmp_path, tmp_path / "launcher.log") == expected


def test_supervisor_names_a_directory_a_group(tmp_path: Path) -> None:
    spec = fake_group()
    assert Supervisor([spec, spec], tmp_path).groups[1].name == "fake/0"
