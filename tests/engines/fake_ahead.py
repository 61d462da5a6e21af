"""The native engine, which says of a CPU what holds for a GPU: that its steps are only queued, and that the
largest is run before there is K/V."""

from __future__ import annotations

import sys

from torch import Tensor

from engines.base import Batch
from engines.native import NativeEngine

MAX_BATCHED = 64
"""Tokens of a step, as its configuration has to say."""


class FakeAheadEngine(NativeEngine):
    """Its steps are done when they were started; what is tested is what the ranks know of each other's."""

    _num_steps = 0

    @property
    def runs_ahead(self) -> bool:
        return True

    def forward(self, batch: Batch) -> Tensor:
        if self._num_steps == 0 and batch.num_tokens != MAX_BATCHED:
            raise AssertionError(f"the first step has {batch.num_tokens} tokens: the largest was not run")
        self._num_steps += 1
        return super().forward(batch)


def _measure_on_cpus_too() -> None:
    """In the worker that loads this engine."""
    worker = sys.modules["__main__"]
    if hasattr(worker, "_measures_a_step"):
        worker._measures_a_step = lambda *_: True


_measure_on_cpus_too()
