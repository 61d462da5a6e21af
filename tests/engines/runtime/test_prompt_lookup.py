"""Guesses from the text itself, and that with them every token is the one that comes without."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Engine
from engines.runtime.prompt_lookup import PromptLookup, Trust
from engines.wire import SamplingParams
from tests.engines.reference import request_of
from tests.engines.runtime.in_process import InProcess, load
from tests.models import MHA, make_llama


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ([], []),
        ([1], []),
        ([1, 1], []),
        ([1, 2, 3, 4], []),
        ([7, 8, 9, 1, 2, 3, 7, 8], [9, 1, 2]),
        ([5, 7, 8, 1, 6, 7, 8, 2, 0, 7, 8], [2, 0, 7]),  # the latest
        ([5, 7, 8, 1, 4, 7, 8, 2, 5, 7, 8], [1, 4, 7]),  # the longest run, though another is later
        ([1, 1, 1], [1]),  # its own end: what there is
        ([256, 1, 0, 65536], []),  # bytes that are alike between two tokens
        ([2, 1, 2, 1], [2, 1]),
    ],
)
def test_what_followed_last_time(text: list[int], want: list[int]) -> None:
    assert PromptLookup().draft(text, 3) == want


@given(st.lists(st.integers(0, 3) | st.sampled_from([256, 65536, 1 << 24]), max_size=60), st.integers(1, 5))
def test_a_guess_did_follow_the_same_tokens(text: list[int], max_tokens: int) -> None:
    guess = PromptLookup().draft(text, max_tokens)
    assert len(guess) <= max_tokens
    runs = [text[start : start + 2 + len(guess)] for start in range(len(text) - 2)]
    assert not guess or [*text[-2:], *guess] in runs
    came_before = any(text[start : start + 2] == text[-2:] for start in range(len(text) - 2))
    assert bool(guess) == came_before


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.set_num_threads(1)
    return load(make_llama(Path(tmp_path_factory.mktemp("model")), MHA, seed=3))


@pytest.mark.parametrize(
    ("temperature", "at_once", "saves_rounds"),
    [
        (0.0, 6, True),
        (0.7, 6, False),  # few guesses hold, and where many run the one that strays most sets the end
        (0.0, 2, True),
        (0.7, 2, True),
    ],
)
def test_guesses_change_no_token(
    engine: Engine, temperature: float, at_once: int, saves_rounds: bool
) -> None:
    """Texts that repeat themselves, from which the model departs somewhere."""
    draw = random.Random(1)
    requests = []
    for number in range(6):
        phrase = [draw.randrange(10, 200) for _ in range(6)]
        sampling = SamplingParams(temperature=temperature, seed=number, top_k=3)
        requests.append(request_of(f"r{number}", phrase * 4, 60, sampling=sampling))
    plain = InProcess(engine, max_num_seqs=at_once)
    guessing = InProcess(engine, max_num_seqs=at_once, drafter=PromptLookup())
    with_each, fewer = [0], [0]  # rounds
    expected = [one.token_ids for one in plain.run(requests, lambda: with_each.append(0))]
    assert [one.token_ids for one in guessing.run(requests, lambda: fewer.append(0))] == expected
    assert (len(fewer) < len(with_each)) == saves_rounds
    before, after = plain.scheduler.stats(0), guessing.scheduler.stats(0)
    assert before.num_drafted_tokens == 0
    assert 0 < after.num_accepted_tokens < after.num_drafted_tokens
    assert after.num_generated_tokens == before.num_generated_tokens == 6 * 60


def test_trust_follows_what_held() -> None:
    trust = Trust()
    assert trust.num_guesses >= 32  # as many as the configuration has
    trust.drew(8, 3)
    assert trust.num_guesses == 6
    trust.drew(6, 0)
    assert trust.num_guesses == 3
    trust.drew(3, 0)
    assert trust.num_guesses == 1
    for rest in (1, 2, 4):  # each time that a single one did not hold, twice as long
        trust.drew(1, 0)
        for _ in range(rest):
            assert trust.num_guesses == 0
            trust.drew(0, 0)
        assert trust.num_guesses == 1
    trust.drew(1, 1)
    assert trust.num_guesses == 2
    trust.drew(2, 0)
    trust.drew(1, 0)
    trust.drew(0, 0)
    assert trust.num_guesses == 1  # the next rest is short again
