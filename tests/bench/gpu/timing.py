"""Clocks for a device that queues its work."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import torch

from engines.runtime.decode_graphs import CudaRecorder


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until all that `work` has queued is done."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def median_seconds(
    work: Callable[[], object], device: torch.device, rounds: int = 10, warm_up: int = 3
) -> float:
    """The median of `rounds`, after some that do not count."""
    for _ in range(warm_up):
        work()
    return median(timed(work, device) for _ in range(rounds))


def replayed_seconds(work: Callable[[], None], device: torch.device) -> float:
    """As median_seconds, but on CUDA without what launching it costs the host: of a recording of `work`."""
    if device.type != "cuda":
        return median_seconds(work, device)
    return median_seconds(CudaRecorder()(work).replay, device)


def release(device: torch.device) -> None:
    """Give back what is no longer used of the device's memory. Raises what the device has failed with, after
    which a process cannot use it any more."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
