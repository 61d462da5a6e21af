"""The admin surface: what it does, and who cannot reach it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gateway import admin, keys
from gateway.admin import CannotAdminister, Control
from gateway.settings import Settings
from tests.e2e.server import FAKE_SERVE, Server, serving, wait_until
from tests.gateway.serving import make_app, make_group, make_model_dir

anyio = pytest.mark.anyio


def ask(server: Server, *command: str) -> subprocess.CompletedProcess[str]:
    """`sluice admin COMMAND`, as its user would."""
    argv = [str(Path(sys.executable).with_name("sluice")), "admin", *command]
    environment = {**os.environ, "SLUICE_LOG_DIR": str(server.home / "logs")}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)


def test_a_gateway_is_steered_over_its_socket(tmp_path: Path) -> None:
    """Status, new keys, a group's restart under a stream, and the end; none of it over TCP."""
    file = tmp_path / "keys.yaml"
    file.write_text('- {name: "alice", key: "key-of-alice-0123456"}\n')
    file.chmod(0o600)
    with serving("--api-key-file", str(file), program=FAKE_SERVE) as server:
        server.client.headers["authorization"] = "Bearer key-of-alice-0123456"
        socket = server.home / "logs" / "admin" / "socket"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        for method, path in (("GET", "/status"), ("POST", "/drain"), ("POST", "/groups/x/restart")):
            assert server.client.request(method, path).status_code == 404

        status = json.loads(ask(server, "status").stdout)
        assert status["pid"] == server.process.pid
        assert status["keys"] == [{"name": "alice", "requests": 0}]
        (group,) = status["groups"]
        assert (group["state"], group["restarts"]) == ("ready", 0)

        file.write_text(keys.file_line("bob", "key-of-bob-012345678") + "\n")
        assert json.loads(ask(server, "reload-keys").stdout) == {"done": "1 keys"}
        assert server.output().count("INFO keys were read again: 1\n") == 1
        assert server.complete().status_code == 401
        server.client.headers["authorization"] = "Bearer key-of-bob-012345678"
        assert server.complete().status_code == 200
        file.write_text("- nonsense\n")
        refused = ask(server, "reload-keys")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "the keys stay as they were" in refused.stderr
        assert f"WARNING {file}:1: is not a mapping" in server.output()
        assert "key-of-" not in server.output()
        assert server.complete().status_code == 200

        expected = server.complete(max_tokens=300).json()["choices"][0]["text"]
        with server.stream(max_tokens=300) as lines:
            next(lines)
            assert ask(server, "restart", group["name"]).returncode == 0
            texts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in texts).endswith(expected[-200:])
        assert json.loads(ask(server, "status").stdout)["groups"][0]["restarts"] == 1
        assert "no group is named nope" in ask(server, "restart", "nope").stderr

        assert ask(server, "drain").returncode == 0
        wait_until(lambda: server.process.poll() == 0, "drained", 60)
        assert not socket.exists()
        gone = ask(server, "status")
        assert gone.returncode == 1
        assert f"no gateway answers at {socket}" in gone.stderr


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Control:
    directory = make_model_dir(tmp_path_factory.mktemp("model"))
    app = make_app(directory, make_group(directory), settings=Settings(api_keys=("a-key-of-mine",)))
    return Control(app.state.gateway, [], lambda: None)


async def status_at(path: Path) -> dict[str, object]:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
        status: dict[str, object] = (await client.get("/status")).json()
        return status


def socket_exists(path: Path) -> bool:
    return path.exists()


@anyio
async def test_a_successor_takes_the_path_and_keeps_it(tmp_path: Path, control: Control) -> None:
    path = tmp_path / "admin" / "socket"
    app = admin.create_admin_app(control)
    async with admin.listening(app, path):
        first = os.stat(path).st_ino
        async with admin.listening(app, path):
            second = os.stat(path).st_ino
            assert second != first
            assert (await status_at(path))["pid"] == os.getpid()
        assert not socket_exists(path)
    async with admin.listening(app, path):
        ours = admin.listening(app, path)
        await ours.__aenter__()
        assert (await status_at(path))["pid"] == os.getpid()
        third = os.stat(path).st_ino
    assert os.stat(path).st_ino == third  # the one that left did not take its successor's away
    await ours.__aexit__(None, None, None)
    assert not socket_exists(path)


@anyio
@pytest.mark.parametrize("mode", [0o755, 0o770, 0o1777])
async def test_a_directory_that_others_can_enter_will_not_do(
    tmp_path: Path, control: Control, mode: int
) -> None:
    (tmp_path / "admin").mkdir()
    (tmp_path / "admin").chmod(mode)
    with pytest.raises(CannotAdminister, match="for this user only"):
        async with admin.listening(admin.create_admin_app(control), tmp_path / "admin" / "socket"):
            pass
    assert list((tmp_path / "admin").iterdir()) == []


@anyio
async def test_a_path_that_leads_elsewhere_will_not_do(tmp_path: Path, control: Control) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "admin").symlink_to(tmp_path / "other")
    app = admin.create_admin_app(control)
    with pytest.raises(CannotAdminister, match="for this user only"):
        async with admin.listening(app, tmp_path / "admin" / "socket"):
            pass
    with pytest.raises(CannotAdminister, match="no admin socket at"):
        async with admin.listening(app, tmp_path / ("x" * 150) / "socket"):
            pass


@anyio
async def test_the_status_shows_names_of_keys_only(tmp_path: Path, control: Control) -> None:
    async with admin.listening(admin.create_admin_app(control), tmp_path / "a" / "s"):
        status = await status_at(tmp_path / "a" / "s")
    assert "a-key-of-mine" not in json.dumps(status)
    assert len(status["keys"]) == 1  # type: ignore[arg-type]
