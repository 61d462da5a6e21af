"""How much of a prompt comes along with a decoding step, where its time is a given function of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engines.runtime.pace import ByStepTime

Cost = Callable[[int, int], float]  # decoding sequences, prompt tokens -> seconds


def flat(num_decoding: int, num_prompt: int) -> float:
    """Reading the weights takes 10 ms; 40 tokens more than double it."""
    return 0.010 + 0.00025 * (num_decoding + num_prompt)


def steep(num_decoding: int, num_prompt: int) -> float:
    return 0.003 * (4 + num_decoding + num_prompt)


def play(pace: ByStepTime, cost: Cost, num_decoding: int, steps: int) -> list[int]:
    """The prompt tokens of each step while prompts never end."""
    taken = []
    for _ in range(steps):
        tokens = pace.prompt_tokens(num_decoding)
        pace.took(num_decoding, tokens, cost(num_decoding, tokens))
        taken.append(tokens)
    return taken


@pytest.mark.parametrize("cost", [flat, steep])
@pytest.mark.parametrize("num_decoding", [1, 8, 100])
def test_steps_come_to_last_as_long_as_allowed_and_no_longer(cost: Cost, num_decoding: int) -> None:
    pace = ByStepTime(2.0)
    later = play(pace, cost, num_decoding, 200)[100:]
    slowdowns = [cost(num_decoding, tokens) / cost(num_decoding, 0) for tokens in later if tokens]
    assert max(slowdowns) <= 2.0 + 1e-9
    assert min(slowdowns) > 1.6
    assert later.count(0) <= 100 // 16 + 1  # the steps that tell how long one takes without


def test_the_first_step_of_so_many_is_without_prompts() -> None:
    pace = ByStepTime(2.0)
    assert play(pace, flat, 4, 3) == [0, 8, 11]
    assert play(pace, flat, 5, 1)[0] > 0  # about as many
    assert play(pace, flat, 8, 2)[0] == 0
    assert play(pace, flat, 4, 2)[0] == 0


def test_one_delay_is_soon_made_good() -> None:
    pace = ByStepTime(2.0)
    usual = play(pace, flat, 8, 200)[-1]
    pace.took(8, usual, 1.0)
    assert pace.prompt_tokens(8) in (0, usual // 2)
    assert play(pace, flat, 8, 8)[-1] > 0.8 * usual


def test_a_step_that_was_slow_without_prompts_counts_little() -> None:
    pace = ByStepTime(2.0)
    usual = max(play(pace, flat, 8, 200))
    pace.took(8, 0, 3 * flat(8, 0))
    assert max(play(pace, flat, 8, 16)) < 2 * usual + 10
    assert max(play(pace, flat, 8, 200)[100:]) <= 1.1 * usual


def test_a_prompt_that_is_shorter_than_allowed_changes_nothing() -> None:
    pace = ByStepTime(2.0)
    play(pace, flat, 8, 100)
    before = pace.prompt_tokens(8)
    pace.took(8, 3, flat(8, 3))
    assert pace.prompt_tokens(8) in (0, before)


def test_growing_contexts_make_for_smaller_pieces() -> None:
    pace = ByStepTime(2.0)
    usual = play(pace, flat, 8, 100)[-2]
    assert play(pace, lambda n, p: flat(n, 3 * p), 8, 50)[-2] < usual / 2


def test_after_many_delays_it_comes_back_from_a_token_at_a_time() -> None:
    pace = ByStepTime(2.0)
    usual = max(play(pace, flat, 8, 100))
    play(pace, lambda n, p: 0.1 if p else flat(n, p), 8, 50)
    assert max(play(pace, flat, 8, 60)) > 0.9 * usual
