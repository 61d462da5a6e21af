"""Tensors between two real processes, in order, whatever their size."""

from __future__ import annotations

import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from engines.runtime import shared_pipe
from engines.runtime.shared_pipe import SharedPipe

RING = 1 << 12
SHAPES = [(1, 96), (7, 96), (32, 64), (300, 33), (1, 1), (2000, 11)]  # from less than the ring to ten of it


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPES[i % len(SHAPES)], generator=generator).to(dtype) for i in range(60)]


def _send(path: Path, dtype: torch.dtype, pause: float) -> None:
    shared_pipe._CAPACITY = RING
    pipe = SharedPipe(path, timeout=30)
    for x in tensors(dtype):
        pipe.send(x)
        time.sleep(pause)


@pytest.mark.parametrize("slow", ["sender", "receiver", "neither"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_sent_is_received_in_order(
    slow: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_pipe, "_CAPACITY", RING)
    path = tmp_path / "pipe"
    sender = get_context("spawn").Process(target=_send, args=(path, dtype, 0.003 * (slow == "sender")))
    sender.start()
    pipe = SharedPipe(path, timeout=30)
    for x in tensors(dtype):
        out = torch.empty_like(x)
        pipe.receive(out)
        assert torch.equal(out, x)
        time.sleep(0.003 * (slow == "receiver"))
    sender.join(30)
    assert sender.exitcode == 0


def test_a_sender_goes_on_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pipe, "_CAPACITY", RING)
    pipe = SharedPipe(tmp_path / "pipe", timeout=0.05)
    for _ in range(2):
        pipe.send(torch.ones(RING // 8))
    with pytest.raises(TimeoutError, match=r"anything for 0\.05 s"):
        pipe.send(torch.ones(1))


def test_a_sender_that_does_not_come_is_a_timeout(tmp_path: Path) -> None:
    pipe = SharedPipe(tmp_path / "pipe", timeout=0.05)
    with pytest.raises(TimeoutError, match="the other stage"):
        pipe.receive(torch.empty(4))
