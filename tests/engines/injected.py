"""Exceptions inside the work of one request, at chosen sites of the real engine.

A victim is a request whose seed says where and when: `seed_of(site, nth, serial)`. From the n-th time on that
the site is reached for it, the site raises, in a call for many rows too. So a group that torchrun has
started needs nothing but its engine (`InjectedEngine`) to be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engines.config import ModelConfig
from engines.native import NativeEngine
from engines.runtime import intake, outcome, plan_builder, sampler
from engines.runtime.mesh import Mesh
from engines.runtime.sequence import Sequence

_MARK = 0x5EED << 44

SITES: dict[str, tuple[Any, str, Callable[..., list[int]]]] = {
    "intake": (intake.Intake, "_new_sequence", lambda self, request: [request.sampling.seed]),
    "bounds": (intake, "out_of_bounds", lambda request, vocab: [request.sampling.seed]),
    "history": (Sequence, "history", lambda self, drafts: [self.request.sampling.seed]),
    "prefix hash": (Sequence, "hash_of_block", lambda self, index, size: [self.request.sampling.seed]),
    "row": (plan_builder, "_row_sampling", lambda one, *_, **__: [one.sequence.request.sampling.seed]),
    "penalties and biases": (sampler, "_adjust_row", lambda logits, row: [row.params.seed]),
    "penalties": (sampler, "_penalise", lambda logits, row: [row.params.seed]),
    "draw": (sampler, "_draw_random", lambda logits, rows, _: [row.params.seed for row in rows]),
    "logprobs": (
        sampler,
        "_logprobs",
        lambda raw, asked, rows, tokens, some: [rows[i].params.seed for i in some],
    ),
    "prompt logprobs": (
        outcome,
        "_collect_prompt_logprobs",
        lambda one, result: [one.sequence.request.sampling.seed],
    ),
    "tokens": (outcome, "_take_tokens", lambda one, *_: [one.sequence.request.sampling.seed]),
    "finish reason": (outcome, "_take_token", lambda sequence, _: [sequence.request.sampling.seed]),
    "delta": (outcome, "_delta", lambda sequence, *_: [sequence.request.sampling.seed]),
}
NAMES = tuple(SITES)
KINDS = (ValueError, RuntimeError, MemoryError, KeyError, RecursionError, AssertionError, OverflowError)


def seed_of(site: str, nth: int, serial: int) -> int:
    """The seed of a victim; `serial` tells victims of one site apart."""
    assert nth < 256
    assert serial < 1 << 24
    return _MARK | serial << 16 | NAMES.index(site) << 8 | nth


class Injector:
    """Counts how often each victim has reached its site, and remembers who was struck."""

    def __init__(self) -> None:
        self.reached: Counter[int] = Counter()
        self.struck: set[int] = set()

    def install(self, patch: Callable[[Any, str, Any], object]) -> None:
        for number, (owner, attribute, seeds_of) in enumerate(SITES.values()):
            patch(owner, attribute, self._wrapped(number, getattr(owner, attribute), seeds_of))

    def _wrapped(self, number: int, original: Callable[..., Any], seeds_of: Callable[..., list[int]]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            for seed in seeds_of(*args, **kwargs):
                if seed >> 44 == _MARK >> 44 and seed >> 8 & 0xFF == number:
                    self._reach(seed)
            return original(*args, **kwargs)

        return call

    def _reach(self, seed: int) -> None:
        self.reached[seed] += 1
        if self.reached[seed] > seed & 0xFF:
            self.struck.add(seed)
            raise KINDS[(seed >> 16) % len(KINDS)]("injected")


@contextmanager
def injecting() -> Iterator[Injector]:
    """In this process, until the end of the context."""
    injector = Injector()
    with pytest.MonkeyPatch.context() as patch:
        injector.install(patch.setattr)
        yield injector


class InjectedEngine(NativeEngine):
    """The native engine in a process whose sites raise."""

    def __init__(self, config: ModelConfig, mesh: Mesh, report: Callable[[float], None]) -> None:
        super().__init__(config, mesh, report)
        Injector().install(setattr)
