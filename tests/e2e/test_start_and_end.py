"""A server from its first line to its last: progress while loading, what listens, and how it ends."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from gateway.model_source import demo_directory
from tests.e2e.server import FAKE_SERVE, MODEL, Server, events, serving, wait_until
from tests.soak import drain, sigkill

SHARED_MEMORY = Path("/dev/shm")


def listening(server: Server) -> set[tuple[str, int]]:
    """Every internet socket that the tree listens on."""
    found = set()
    for process in server.tree():
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                    found.add((connection.laddr.ip, connection.laddr.port))
    return found


def loading(server: Server) -> Iterator[dict[str, object]]:
    """What /readyz says of the one group until it says 200."""
    while True:
        with suppress(httpx.TransportError):
            response = server.client.get("/readyz")
            if response.status_code == 200:
                return
            assert response.status_code == 503
            yield response.json()["models"][0]["groups"][0]


def test_loading_can_be_watched_and_nothing_listens_off_loopback() -> None:
    """Over the whole start, seen from outside; then the whole tree at rest."""
    phases, sockets = [], set()
    with serving("--tp", "2", wait=False) as server:
        for group in loading(server):
            phases.append((group["phase"], group["percent"]))
            sockets |= listening(server)
            if len(phases) == 1:
                refused = server.complete()
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
        sockets |= listening(server)
        assert sorted(server.workers()) == [0, 1]
        assert server.complete().status_code == 200
        assert server.stop() == 0
        assert server.output().count(": ready") == 1
        assert server.output().endswith("\nstopped\n")
    # The ranks' own all-reduce listens on loopback, as gloo does; nothing else, and nothing anywhere else.
    assert {address for address, _ in sockets} == {"127.0.0.1"}
    assert phases
    assert {phase for phase, _ in phases} <= {"start", "connect", "load", "allocate", "warmup"}
    percents = [percent for _, percent in phases]
    assert percents == sorted(percents)  # type: ignore[type-var]
    assert all(0 <= percent <= 100 for percent in percents)  # type: ignore[operator]


def test_off_loopback_is_one_listener_that_was_asked_for() -> None:
    """With two ranks, which talk to each other over sockets of their own."""
    with serving("--tp", "2", "--host", "0.0.0.0") as server:
        assert server.complete().status_code == 200
        found = listening(server)
        assert len(found) > 1  # what the ranks listen on is seen
        assert [(host, port) for host, port in found if host != "127.0.0.1"] == [("0.0.0.0", server.port)]
        assert server.stop() == 0


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones() -> None:
    with serving() as server:
        assert listening(server) == {("127.0.0.1", server.port)}  # one rank: the HTTP port and no other
        before = {process.pid for process in server.tree()}
        with server.stream(max_tokens=400, ignore_eos=True, stream_options={"include_usage": True}) as lines:
            stream = events(lines)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.client.get("/readyz").status_code == 503, "readiness off")
            assert server.complete().status_code == 503
            *_, usage, end = stream
        assert end == {"done": True}
        assert usage["usage"]["completion_tokens"] == 400  # type: ignore[index]
        assert server.process.wait(30) == 0
        assert server.run_dirs() == []
        assert not [pid for pid in before if psutil.pid_exists(pid)]


def test_a_second_signal_hurries_and_says_so_in_the_stream() -> None:
    with serving() as server, server.stream(max_tokens=1900, ignore_eos=True) as lines:
        stream = events(lines)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: server.client.get("/readyz").status_code == 503, "readiness off")
        server.process.send_signal(signal.SIGINT)
        *_, last = stream
        assert last["error"]["code"] == "shutting_down"  # type: ignore[index]
        assert server.process.wait(30) == 0


def test_nothing_is_left_when_the_gateway_is_killed() -> None:
    with serving("--tp", "2") as server:
        tree = server.tree()
        assert len(tree) >= 5  # gateway, guard, torchrun, two ranks
        assert server.run_dirs()
        with server.stream(max_tokens=1900, ignore_eos=True) as lines:
            next(events(lines))
            server.process.kill()
            server.process.wait()
            _, alive = psutil.wait_procs(tree[1:], timeout=3)
            assert alive == []
        wait_until(lambda: server.run_dirs() == [], "run directories gone", 3)
        assert list(SHARED_MEMORY.glob(f"*sluice-{server.process.pid}-*")) == []
        with socket.create_server(("127.0.0.1", server.port)):
            pass  # the port is free again


def test_a_checkpoint_that_cannot_be_served_ends_the_server_with_its_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo_directory(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with serving(str(broken), wait=False) as server:
        assert server.process.wait(60) == 1
        *_, last = server.output().splitlines()
        assert last.startswith("sluice: error: broken/0: ")
        assert str(weights) in last
        assert server.output().count(str(weights)) == 1
        assert server.run_dirs() == []


def test_a_server_whose_last_group_has_failed_for_good_ends(tmp_path: Path) -> None:
    """So that who watches over it starts it anew. Until then the group was tried again: what it had loaded
    once might have come back."""
    model = tmp_path / "model"
    shutil.copytree(demo_directory(), model)
    file = tmp_path / "model-config.yaml"
    settings = {
        "modelName": MODEL,
        "deviceType": "cpu",
        "handler": {"model_path": str(model)},
        "maxRetryTimeoutInSec": 3,
    }
    file.write_text(json.dumps(settings))
    with serving(str(file)) as server:
        (model / "model.safetensors").unlink()
        server.workers()[0].kill()
        assert server.process.wait(120) == 1
        *_, last = server.output().splitlines()
        assert last.startswith(f"sluice: error: {MODEL}/0: failing for ")
        assert "model.safetensors" in last
        assert server.output().count("starting again") >= 1
        assert server.run_dirs() == []


def test_sigkill_of_gateway_or_launcher_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of trials within three seconds are in tests/soak/sigkill.py; a busy machine has time."""
    monkeypatch.setattr(sigkill, "LIMIT_SECONDS", 30.0)
    figures = sigkill.trials(3, 10, real=False)
    print(figures)
    assert sigkill.num_failed(figures) == 0, figures


def test_streams_that_run_or_queue_at_sigterm_all_end_well() -> None:
    """Fifty times in tests/soak/drain.py."""
    figures = drain.run(2)
    print(figures)
    assert figures["failed"] == 0, figures["problems"]
    assert figures["streams_open_at_the_signal"] > 0  # type: ignore[operator]


def test_a_signal_while_loading_ends_it_at_once_and_leaves_nothing() -> None:
    with serving("--tp", "2", wait=False) as server:
        wait_until(lambda: len(server.tree()) >= 3, "the group's processes", 60)
        tree = server.tree()
        assert server.stop() == 0
        assert not [process for process in tree if process.is_running()]
        assert server.run_dirs() == []


def test_systemd_is_told_of_readiness_and_of_the_end() -> None:
    """Type=notify: READY=1 when it answers, STOPPING=1 when it leaves."""
    with tempfile.TemporaryDirectory() as home, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        path = f"{home}/notify"
        systemd.bind(path)
        systemd.settimeout(60)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOTIFY_SOCKET", path)
            with serving(program=FAKE_SERVE) as server:
                assert systemd.recv(100) == b"READY=1"
                assert server.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"
