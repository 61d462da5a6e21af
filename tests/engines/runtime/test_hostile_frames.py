"""Generate frames with any value at any field, over a real socket into the real leader and model.

Each is refused, served, or ends the connection; never the leader, and never a batch-mate.
"""

from __future__ import annotations

import math
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engines import wire
from engines.base import Engine
from engines.runtime.inbox import Inbox
from engines.runtime.leader import Leader
from engines.wire import Generate, SamplingParams, Tokens
from tests.engines.reference import GREEDY, request_of
from tests.engines.runtime.in_process import Ended, InProcess, alone, load
from tests.models import MHA, make_llama

SECONDS = 60.0
NUMBERS: list[Any] = [
    *(0, 1, -1, 20, 21, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**31) - 1, -(2**63)),
    *(math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 0.5),
]
LISTS: list[Any] = [
    [],
    [-1],
    [2**31],
    [2**63],
    [2**64 - 1],
    [MHA.vocab],
    [0] * 100_000,
    [1] * 65,
    [1.5],
    [None],
]
MAPS: list[Any] = [
    *({}, {-1: 1.0}, {2**31: 1.0}, {2**64 - 1: 0.0}, {5: math.nan}, {5: math.inf}, {5: 101.0}),
    *(dict.fromkeys(range(2000), 1.0), {"5": 1.0}, {MHA.vocab: 1.0}),
]
TEXTS: list[Any] = ["", "x" * 257, "x" * 100_000, "\0", "ä" * 200, b"", b"x" * 257, b"\xff\xfe"]
OTHERS: list[Any] = [None, True, False, {}, [[]]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load(make_llama(tmp_path_factory.mktemp("models") / "mha", MHA, seed=3))


class Peer:
    """The gateway's end of a socket on whose other end a leader runs in a thread."""

    def __init__(self, engine: Engine, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        self.inbox = Inbox(path, end_process=lambda code: None)
        self.socket, _ = listener.accept()
        self.socket.settimeout(SECONDS)
        listener.close()
        path.unlink()
        self.group = InProcess(engine)
        self.failure: BaseException | None = None
        self._leader = Leader(self.group.scheduler, self.group.leader._runner, self.inbox, 1)
        self._frames = wire.FrameBuffer()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.ended: dict[str, Ended] = {}

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._leader.run()
        except BaseException as error:
            self.failure = error
        self.inbox.close()

    def send(self, body: bytes) -> None:
        self.socket.sendall(len(body).to_bytes(4, "big") + body)

    def generate(self, *requests: Generate) -> None:
        """All at once: none of them ends before the last has come."""
        self.socket.sendall(b"".join(map(wire.encode, requests)))

    def until_ended(self, id: str) -> Ended | None:
        """None: the connection has ended."""
        while not self.ended.setdefault(id, Ended()).has_ended:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            for body in self._frames.feed(data):
                message = wire.from_worker_decoder.decode(body)
                for delta in message.deltas if isinstance(message, Tokens) else ():
                    one = self.ended.setdefault(delta.id, Ended())
                    if not one.has_ended:  # what comes of another by that id does not count
                        one.token_ids += delta.token_ids
                        one.finish_reason, one.error = delta.finish_reason, delta.error
        return self.ended[id]

    def close(self) -> None:
        """The leader ends with its connection, and by itself."""
        self.socket.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert self.failure is None, f"the leader ended with {self.failure!r}"


def hostile_bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Valid frames in which one field, or one of the sampling parameters, is something else."""
    draw = random.Random(seed)
    values = [*NUMBERS, *LISTS, *MAPS, *TEXTS, *OTHERS]
    for number in range(count):
        id = f"hostile {number}"
        fields: dict[Any, Any] = {"type": "generate", "id": id, "prompt_ids": [5, 6, 7], "max_tokens": 3}
        sampling: dict[Any, Any] = {"temperature": 0.7, "seed": number}
        if draw.random() < 0.5:
            sampling[draw.choice(SamplingParams.__struct_fields__)] = draw.choice(values)
        else:
            name = draw.choice([f for f in Generate.__struct_fields__ if f not in ("id", "sampling")])
            fields[name] = draw.choice(values)
        yield id, msgspec.msgpack.encode({**fields, "sampling": sampling})


def test_any_value_at_any_field(engine: Engine, tmp_path: Path) -> None:
    """400 of them, a good request beside each that gives what it gives alone."""
    torch.set_num_threads(1)
    good = request_of("good", [9, 8, 7], 4)
    expected = alone(engine, good).token_ids
    outcomes = {"refused": 0, "served": 0, "connection ended": 0}
    peer = Peer(engine, tmp_path / "0")
    for number, (id, body) in enumerate(hostile_bodies(400, seed=1)):
        decodes = True
        try:
            wire.to_worker_decoder.decode(body)
        except msgspec.ValidationError:
            decodes = False
        mate = msgspec.structs.replace(good, id=f"good {number}")
        peer.generate(mate)
        peer.send(body)
        ended = peer.until_ended(id)
        assert (ended is not None) == decodes, body[:200]
        if ended is None:
            outcomes["connection ended"] += 1
            peer.close()
            peer = Peer(engine, tmp_path / str(number + 1))
            continue
        outcomes["refused" if ended.error else "served"] += 1
        assert ended.error is None or ended.error.code in ("invalid_request", "too_long"), ended.error
        mates = peer.until_ended(mate.id)
        assert mates is not None
        assert mates.token_ids == expected
    peer.group.scheduler.check()
    peer.close()
    assert min(outcomes.values()) > 20, outcomes
    print(outcomes)


def test_an_id_that_is_taken_harms_nobody(engine: Engine, tmp_path: Path) -> None:
    """The second is refused by that id; the first, in the engine, and all others go on."""
    mate = request_of("mate", [5, 6, 7], 8)
    expected = alone(engine, mate).token_ids
    peer = Peer(engine, tmp_path / "socket")
    first = request_of("same", [9, 8, 7], 500)
    peer.generate(first, request_of("same", [5, 5, 5], 500))
    ended = peer.until_ended("same")
    assert ended is not None
    assert ended.error is not None
    assert ended.error.code == "invalid_request"
    peer.generate(mate)
    mates = peer.until_ended("mate")
    assert mates is not None
    assert mates.token_ids == expected
    peer.socket.sendall(wire.encode(wire.Abort("same")))
    peer.socket.sendall(wire.encode(wire.Abort("nobody")))
    peer.generate(request_of("last", [5, 6, 7], 8))
    assert peer.until_ended("last") is not None
    peer.group.assert_empty()
    peer.close()


@pytest.mark.parametrize("prompt", [[], [MHA.vocab - 1] * 5000])
def test_prompts_that_nothing_can_serve(engine: Engine, tmp_path: Path, prompt: list[int]) -> None:
    peer = Peer(engine, tmp_path / "socket")
    peer.generate(Generate(id="a", prompt_ids=prompt, max_tokens=4, sampling=GREEDY))
    ended = peer.until_ended("a")
    assert ended is not None
    assert ended.error is not None
    assert ended.error.code == ("too_long" if prompt else "invalid_request")
    peer.close()
