"""FakeWorker: a worker group without a model, for tests of what stands around one. No torch; up in 0.2 s.

    python tests/fake_worker.py RUN_DIR

speaks engines.wire over RUN_DIR/gateway.sock. A sequence gets its own prompt again and again, a token a
step (`token_at`). The environment variable FAKE_WORKER (JSON of `Behaviour`) makes it slow, hang, fail, die.
With `num_ranks` above 1 this process stands in for torchrun: it starts the ranks in sessions of their own,
and when one of them dies it ends them all, with code 1.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from gateway.workers.process import Command

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from engines import wire  # noqa: E402
from engines.wire import (  # noqa: E402
    Failed,
    FromWorker,
    Generate,
    Progress,
    Ready,
    RequestError,
    Stats,
    TokenDelta,
    Tokens,
)

VOCAB_SIZE = 32000
MAX_MODEL_LEN = 4096
HEARTBEAT_SECONDS = 0.1


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the fake shall do. Steps with work count from 1; 0 is never."""

    num_ranks: int = 1
    compile_seconds: float = 0.0
    load_seconds: float = 0.0
    step_seconds: float = 0.001
    max_num_seqs: int = 256
    fail: str = ""  # a Failed frame with this reason instead of Ready
    fail_permanently: bool = False
    crash: str = ""  # RuntimeError with this text while loading, without a frame
    die_at_step: int = 0  # SIGKILL to itself
    hang_at_step: int = 0  # no step is finished any more; the heartbeat goes on
    babble_at_step: int = 0  # sends what is no frame
    mute_prompt: int = -1  # a prompt that begins with this id gets nothing, while others go on


def fake_command(behaviour: Behaviour, run_dir: Path) -> Command:
    """A FakeWorker under the real guard, as GroupSpec.command wants it."""
    from gateway.workers.process import Command  # not for the worker itself: it shall start fast

    argv = (sys.executable, "-m", "engines.guard", str(run_dir), "--", sys.executable, __file__, str(run_dir))
    environment = {"FAKE_WORKER": msgspec.json.encode(behaviour).decode(), "PYTHONPATH": str(REPO)}
    return Command(argv, {**os.environ, **environment})


def token_at(prompt_ids: list[int], index: int) -> int:
    """The fake's token at `index` of its answer."""
    return prompt_ids[index % len(prompt_ids)]


def main() -> None:
    behaviour = msgspec.json.decode(os.environ.get("FAKE_WORKER", "{}"), type=Behaviour)
    run_dir = Path(sys.argv[1])
    _die_with_parent()
    if len(sys.argv) > 2:  # a rank other than 0: it has nothing to do
        time.sleep(3600)
    elif behaviour.num_ranks > 1 and "RANK" not in os.environ:
        _launch(run_dir, behaviour.num_ranks)
    else:
        FakeWorker(run_dir, behaviour).run()


def _launch(run_dir: Path, num_ranks: int) -> None:
    followers = [_start_rank([str(run_dir), "follower"], {}) for _ in range(num_ranks - 1)]
    pids = json.dumps([process.pid for process in followers])
    _start_rank([str(run_dir)], {"RANK": "0", "FAKE_FOLLOWERS": pids})
    os.wait()
    os._exit(1)  # the ranks die with their parent


def _start_rank(argv: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, *argv]
    environment = {**os.environ, **environment, "FAKE_PARENT": str(os.getpid())}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.environ.get("FAKE_PARENT", str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # it died before it could be said that this process shall die with it


@dataclass
class FakeSequence:
    request: Generate
    num_tokens: int = 0


class FakeWorker:
    """Rank 0: one thread, one step after the other."""

    def __init__(self, run_dir: Path, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._config = json.loads((run_dir / "launch.json").read_text())
        self._shared = Path("/dev/shm") / f"{run_dir.name}-fake"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(run_dir / "gateway.sock"))
        self._frames = wire.FrameBuffer()
        self._sequences: dict[str, FakeSequence] = {}
        self._num_steps = self._num_busy_steps = 0
        self._heartbeat_at = 0.0

    def run(self) -> None:
        self._shared.write_bytes(b"shared memory")
        self._load()
        while True:
            self._receive(0.0 if self._running() and not self._hangs() else HEARTBEAT_SECONDS)
            if self._hangs():
                self._beat()
                continue
            self._num_steps += 1
            if self._running():
                self._step()
            self._beat()

    def _load(self) -> None:
        behaviour = self._behaviour
        if behaviour.compile_seconds:
            self._send(Progress("compile", 0.0))
            time.sleep(behaviour.compile_seconds)
        for fraction in (0.0, 0.5, 1.0):
            self._send(Progress("load", fraction))
            time.sleep(behaviour.load_seconds / 3)
        if behaviour.crash:
            raise RuntimeError(behaviour.crash)
        if behaviour.fail:
            self._send(Failed(behaviour.fail, behaviour.fail_permanently))
            time.sleep(3600)
        self._send(self._ready())

    def _ready(self) -> Ready:
        return Ready(
            engine="fake",
            dtype="float32",
            device="cpu",
            tp_size=self._behaviour.num_ranks,
            pp_size=1,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=self._behaviour.max_num_seqs,
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            num_blocks=1024,
            block_size=16,
            eos_token_ids=[],
            fingerprint=f"fake-{self._config['model_name']}",
            load_seconds=self._behaviour.load_seconds,
            pids=[os.getpid(), *json.loads(os.environ.get("FAKE_FOLLOWERS", "[]"))],
        )

    def _hangs(self) -> bool:
        return 0 < self._behaviour.hang_at_step <= self._num_busy_steps

    def _running(self) -> list[FakeSequence]:
        mute = self._behaviour.mute_prompt
        heard = [each for each in self._sequences.values() if each.request.prompt_ids[0] != mute]
        return heard[: self._behaviour.max_num_seqs]

    def _receive(self, timeout: float) -> None:
        if not select.select([self._socket], [], [], timeout)[0]:
            return
        data = self._socket.recv(1 << 18)
        if not data:
            os._exit(0)  # the gateway is gone
        for body in self._frames.feed(data):
            message = wire.to_worker_decoder.decode(body)
            if isinstance(message, Generate):
                self._add(message)
            else:
                self._sequences.pop(message.id, None)

    def _add(self, request: Generate) -> None:
        if len(request.prompt_ids) + request.max_tokens > MAX_MODEL_LEN:
            error = RequestError("too_long", f"more than {MAX_MODEL_LEN} tokens")
            self._send(Tokens([TokenDelta(id=request.id, error=error)]))
        else:
            self._sequences[request.id] = FakeSequence(request, len(request.resume_token_ids))

    def _step(self) -> None:
        time.sleep(self._behaviour.step_seconds)
        self._num_busy_steps += 1
        if self._num_busy_steps == self._behaviour.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._num_busy_steps == self._behaviour.babble_at_step:
            self._socket.sendall(b"\0\0\0\4what")
        self._send(Tokens([self._advance(sequence) for sequence in self._running()]))

    def _advance(self, sequence: FakeSequence) -> TokenDelta:
        request = sequence.request
        token = token_at(request.prompt_ids, sequence.num_tokens)
        sequence.num_tokens += 1
        is_stop = token in request.stop_token_ids and sequence.num_tokens >= request.min_tokens
        is_last = is_stop or sequence.num_tokens == request.max_tokens
        if is_last:
            del self._sequences[request.id]
        return TokenDelta(
            id=request.id,
            token_ids=[token],
            finish_reason=("stop" if is_stop else "length") if is_last else None,
            is_stop_token=is_stop,
            num_cached_tokens=0 if sequence.num_tokens == 1 else None,
        )

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + HEARTBEAT_SECONDS
            running = len(self._running())
            waiting = len(self._sequences) - running
            self._send(Stats(num_steps=self._num_steps, num_running=running, num_waiting=waiting))

    def _send(self, message: FromWorker) -> None:
        self._socket.sendall(wire.encode(message))


if __name__ == "__main__":
    main()
