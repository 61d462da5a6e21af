"""Exceptions in one request's own work, in a real group under torchrun: it fails alone and the group goes on.

The thousand are in tests/soak/injected_exceptions.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.wire import SamplingParams
from tests.engines.harness import running
from tests.engines.injected import NAMES, seed_of
from tests.engines.layouts import Layout
from tests.engines.reference import prompts, request_of
from tests.models import GQA, make_llama

NUM_BLOCKS = 64


@pytest.mark.slow
def test_at_every_site_in_a_group_of_two(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "gqa", GQA, seed=3)
    config = Layout("injected", tp=2).config(model, num_blocks=NUM_BLOCKS, block_size=16, max_batched=64)
    others = [request_of(f"other {i}", prompt, 16) for i, prompt in enumerate(prompts(len(NAMES), GQA.vocab))]
    with running(config) as group:
        pids = group.info.pids
        expected = [one.token_ids for one in group.run(others)]
        for nth in (0, 2):
            victims = [
                request_of(
                    f"victim {site} {nth}",
                    other.prompt_ids,
                    20,
                    sampling=SamplingParams(
                        seed=seed_of(site, nth, serial), presence_penalty=0.5, logprobs=2, temperature=0.8
                    ),
                    prompt_logprobs=1 if site == "prompt logprobs" else None,
                )
                for serial, (site, other) in enumerate(zip(NAMES, others, strict=True))
            ]
            mates = [request_of(f"mate {nth} {i}", other.prompt_ids) for i, other in enumerate(others)]
            ended = group.run([one for pair in zip(victims, mates, strict=True) for one in pair])
            assert [one.token_ids for one in ended[1::2]] == expected
            struck = {site for site, one in zip(NAMES, ended[::2], strict=True) if one.error is not None}
            once = {"intake", "bounds", "prompt logprobs", "prefix hash"}  # reached once or a few times only
            assert struck >= set(NAMES) - (once if nth else set())
            assert all(one.error is None or one.error.code == "internal" for one in ended[::2])
        stats = group.idle_stats()
        assert group.info.pids == pids, "the group is the same"
        assert stats.num_blocks_used == stats.num_account_faults == 0
        assert stats.num_blocks_free + stats.num_blocks_cached == NUM_BLOCKS
