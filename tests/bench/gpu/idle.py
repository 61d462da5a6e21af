"""How long the device waits for the host while it decodes, and what it does meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from engines.runtime.plan import StepPlan
from engines.runtime.runner import ModelRunner
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.decode import FEW, WARM_UP, Decoder, part_of, run_ahead
from tests.bench.gpu.timing import timed

_STEPS, _TOP = 30, 10
Span = tuple[float, float, str]
"""Start and end in microseconds, and what ran."""


def measure(bench: Bench) -> None:
    batch = min(FEW, max(bench.options.batches))
    bench.part(part_of(batch), lambda: _row(bench, batch))


def _row(bench: Bench, batch: int) -> dict[str, Any]:
    with _profile(bench):  # it starts slowly, and should be there before what it traces is recorded
        torch.zeros(1, device=bench.device).add_(1)
    decoder = Decoder(bench, bench.engine(), batch)
    runner = decoder.runner(is_recorded=True)
    seconds = decoder.seconds(runner, batch)
    plans = decoder.plans(batch)
    run_ahead(runner, plans[:WARM_UP])
    traced = plans[WARM_UP : WARM_UP + _STEPS]
    wall, spans = _traced(bench, runner, traced)
    return summary(spans, len(traced), 1e6 * wall, 1e6 * seconds)


def _profile(bench: Bench) -> profile:
    return profile(activities=[ProfilerActivity.CUDA if bench.options.is_cuda else ProfilerActivity.CPU])


def _traced(bench: Bench, runner: ModelRunner, plans: Sequence[StepPlan]) -> tuple[float, list[Span]]:
    """Seconds of all of them, and what the device did; on a CPU torch's operations."""
    wanted = DeviceType.CUDA if bench.options.is_cuda else DeviceType.CPU
    with _profile(bench) as profiler:
        wall = timed(lambda: run_ahead(runner, plans), bench.device)
    return wall, [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type == wanted
    ]


def summary(spans: Sequence[Span], num_steps: int, wall: float, unprofiled: float) -> dict[str, Any]:
    """`wall`: microseconds of the steps traced; `unprofiled`: of one step, without the profiler, which slows
    the host down. The top's shares are of all that ran, a row for each name."""
    if not spans:
        raise RuntimeError("the profiler saw nothing of the device's work")
    busy, times = covered(spans), defaultdict[str, float](float)
    for start, end, name in spans:
        times[name] += end - start
    top = sorted(times.items(), key=lambda item: -item[1])[:_TOP]
    return {
        "launches_a_step": round(len(spans) / num_steps, 1),
        "busy_us_a_step": round(busy / num_steps, 1),
        "step_us": round(unprofiled, 1),
        "profiled_step_us": round(wall / num_steps, 1),
        "idle": round(1 - busy / num_steps / unprofiled, 3),
        "profiled_idle": round(1 - busy / wall, 3),
        "top": [{"name": name[:120], "share": round(spent / sum(times.values()), 4)} for name, spent in top],
    }


def covered(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of them runs."""
    total, done = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        total += max(0.0, end - max(start, done))
        done = max(done, end)
    return total
