"""Exceptions injected into one request's own work, at every marked site, while others run beside it: it fails
alone, all others give what they give alone, no block is lost and the group goes on.
"""

from __future__ import annotations

import logging
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec
import torch

from engines.base import Engine
from engines.wire import Generate
from tests.engines.injected import NAMES, Injector, injecting, seed_of
from tests.engines.runtime.in_process import InProcess, load
from tests.models import MHA, make_llama
from tests.soak import _figures
from tests.soak.random_mixes import Requests, Seen, compare

MAX_VICTIMS = 3


def victim_of(request: Generate, site: str, draw: random.Random, serial: int) -> Generate:
    """That request, made to reach the site, and to fail there the first times or some time later."""
    nth = draw.choice((0, 0, 1, 2, 5))
    sampling = msgspec.structs.replace(
        request.sampling,
        seed=seed_of(site, nth, serial),
        temperature=0.8,
        presence_penalty=0.5,
        logprobs=2,
    )
    return msgspec.structs.replace(
        request,
        id=f"victim {serial}",
        group="",
        choice=0,
        max_tokens=max(request.max_tokens, 8),
        resume_token_ids=[],
        prompt_logprobs=1 if site == "prompt logprobs" else None,
        sampling=sampling,
    )


class Trials:
    """Mixes with victims until enough of them were struck."""

    def __init__(self, engine: Engine, requests: Requests, injector: Injector, seed: int) -> None:
        self._engine, self._requests, self._injector = engine, requests, injector
        self._draw = random.Random(seed)
        self._serial = 0
        self.seen = Seen()
        self.by_site: Counter[str] = Counter()

    def run_mix(self) -> None:
        draw = self._draw
        group = InProcess(
            self._engine,
            num_blocks=draw.choice((20, 100)),
            block_size=8,
            max_num_seqs=draw.choice((4, 8)),
            max_batched=draw.choice((16, 256)),
        )
        families = [(n, self._requests.made[n]) for n in draw.sample(range(len(self._requests.made)), 4)]
        sites = draw.choices(NAMES, k=draw.randint(1, MAX_VICTIMS))
        victims = [self._victim(site, families) for site in sites]
        everybody = [*(one for _, family in families for one in family), *victims]
        draw.shuffle(everybody)
        group.run(everybody)
        group.assert_empty()
        for number, family in families:
            for choice, one in enumerate(family):
                compare(one, group, self._requests.alone(number, choice), False, self.seen)
        for site, victim in zip(sites, victims, strict=True):
            self._check_victim(site, victim, group)

    def _victim(self, site: str, families: list[tuple[int, list[Generate]]]) -> Generate:
        """One that shares a prefix with a batch-mate."""
        self._serial += 1
        _, family = self._draw.choice(families)
        return victim_of(family[0], site, self._draw, self._serial)

    def _check_victim(self, site: str, victim: Generate, group: InProcess) -> None:
        ended = group.ended(victim.id)
        if victim.sampling.seed in self._injector.struck:
            self.by_site[site] += 1
            if ended.error is None or ended.error.code != "internal":
                self.seen.differences.append(f"struck at {site}, and ended with {ended.error}")
        elif ended.finish_reason is None and (ended.error is None or ended.error.code != "too_long"):
            self.seen.differences.append(f"not struck at {site}, and ended with {ended.error}")


def run(trials: int, seed: int = 1) -> dict[str, object]:
    """`trials` victims that were struck."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # a traceback for each of them
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, injecting() as injector:
        engine = load(make_llama(Path(directory), MHA, seed=3))
        todo = Trials(engine, Requests(engine, seed, min(600, 20 + trials)), injector, seed)
        while todo.by_site.total() < trials:
            todo.run_mix()
    logging.disable(logging.NOTSET)
    return {
        "injected": todo.by_site.total(),
        "by site": dict(sorted(todo.by_site.items())),
        "other sequences compared": todo.seen.counts["sequences"],
        "their tokens": todo.seen.counts["compared tokens"],
        "seconds": round(time.monotonic() - started),
        "differences": todo.seen.differences[:10],
        "failed": len(todo.seen.differences),
    }


if __name__ == "__main__":
    _figures.main("injected_exceptions", __doc__, 1_000, run)
