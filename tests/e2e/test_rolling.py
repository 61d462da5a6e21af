"""A server is replaced by the next on the same port: nothing is refused, reset or cut. Over fake groups."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable

import httpx
import pytest

from tests.e2e.server import FAKE_SERVE, MODEL, Server, events, serving, wait_until
from tests.soak import rolling
from tests.soak.rolling import END_SECONDS, Generations, generations

NUM_RESTARTS, NUM_REQUESTS = 2, 200


@pytest.mark.parametrize("step", [rolling.replace, rolling.restart])
def test_no_request_fails_while_servers_follow_each_other(step: Callable[[Generations], Server]) -> None:
    """Plain clients of every kind, which repeat nothing; thousands in tests/soak/rolling.py."""
    figures = rolling.run(step, NUM_RESTARTS, NUM_REQUESTS)
    print(figures)
    assert figures["num_failed"] == 0, figures["failures"]
    assert figures["requests"] >= NUM_REQUESTS  # type: ignore[operator]
    assert figures["exit_codes"] == [0] * NUM_RESTARTS
    assert set(figures["answered_by"]) == {f"fp_{number}" for number in range(NUM_RESTARTS + 1)}  # type: ignore[call-overload]
    assert figures["left_of_old_servers"] == 0


def ask(made: Generations) -> str:
    """Which server answered, over a connection of its own."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
    answer = httpx.post(made.url, json=body, timeout=60).raise_for_status().json()
    return str(answer["system_fingerprint"])


def test_a_successor_that_cannot_start_leaves_the_old_one_serving() -> None:
    with generations() as made:
        broken = made.start("--replace", "--api-key", "")
        assert broken.process.wait(END_SECONDS) == 1
        assert ask(made) == "fp_0"
        made.until_ready(made.start("--replace"))  # a later one is not refused
        assert ask(made) == "fp_2"
        assert made.servers[0].process.wait(END_SECONDS) == 0


def test_a_successor_has_the_listener_when_the_old_one_is_killed() -> None:
    with generations() as made:
        old, successor = made.servers[0], made.start("--replace")
        wait_until(lambda: ": starting under guard" in successor.output(), "the successor has begun")
        old.process.kill()
        old.process.wait()
        assert ask(made) == "fp_1"  # it waited in the queue, if it had to
        made.until_ready(successor)
        assert successor.stop() == 0
        assert list(made.home.glob("sluice*")) == []


def test_one_at_a_time_may_replace() -> None:
    with generations() as made:
        first = made.start("--replace")
        first_pid = first.process.pid
        wait_until(lambda: ": starting under guard" in first.output(), "the first has begun")
        first.process.send_signal(signal.SIGSTOP)
        second = made.start("--replace")
        assert second.process.wait(END_SECONDS) == 1
        assert "being replaced already" in second.output()
        first.process.send_signal(signal.SIGCONT)
        made.until_ready(first)
        assert made.servers[0].process.wait(END_SECONDS) == 0
        assert first.process.pid == first_pid
        assert ask(made) == "fp_1"


def test_without_anything_to_replace_it_listens_itself() -> None:
    with serving("--replace", program=FAKE_SERVE) as server:
        assert server.complete().status_code == 200
        assert server.stop() == 0
        assert [path.name for path in (server.home / "tmp").iterdir()] == []


def test_answers_say_that_the_connection_closes_and_a_stream_outlives_its_server() -> None:
    with generations() as made, made.servers[0].stream(max_tokens=1900, ignore_eos=True) as lines:
        stream = events(lines)
        next(stream)
        made.until_ready(made.start("--replace"))
        old = made.servers[0]
        wait_until(lambda: not list(made.home.glob(f"sluice.{old.process.pid}.*")), "handed over")
        assert ask(made) == "fp_1"
        *_, end = stream
        assert end == {"done": True}
        answer = old.complete()  # over the stream's connection, which was promised to live on
        assert answer.json()["system_fingerprint"] == "fp_0"
        assert answer.headers["connection"] == "close"
        assert old.process.wait(END_SECONDS) == 0


def test_a_kept_connection_that_nobody_uses_is_closed_in_the_end() -> None:
    with generations() as made:
        old = made.servers[0]
        assert old.complete().status_code == 200  # httpx keeps this connection
        made.until_ready(made.start("--replace"))
        assert old.process.wait(END_SECONDS) == 0


def test_more_than_one_socket_of_systemd_is_refused() -> None:
    argv = ["/bin/sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"', "sh", *FAKE_SERVE]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "sluice: error: systemd passed 2 sockets; give the .socket unit one ListenStream"
    ]
