"""The number of threads, where a step's time is a given function of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engines.runtime.thread_choice import ThreadChoice

Cost = Callable[[int], float]  # threads -> seconds


def play(choice: ThreadChoice, cost: Cost, steps: int, *, tokens: int = 32, most: int = 16) -> list[int]:
    """The threads of each step."""
    taken = []
    for _ in range(steps):
        threads = choice.threads(tokens, most)
        choice.took(tokens, threads, cost(threads))
        taken.append(threads)
    return taken


def best_of(best: int) -> Cost:
    return lambda threads: 0.001 * max(threads / best, best / threads)


@pytest.mark.parametrize("best", [1, 2, 8, 16])
def test_it_comes_to_the_fastest_and_seldom_tries_another(best: int) -> None:
    choice = ThreadChoice()
    play(choice, best_of(best), 3000)
    later = play(choice, best_of(best), 3000)
    assert later.count(best) > 0.98 * 3000
    assert len(set(later)) > 1  # times change


def test_it_starts_with_the_most() -> None:
    assert set(play(ThreadChoice(), best_of(1), 24, most=3)) == {3}


def test_it_follows_what_changes() -> None:
    choice = ThreadChoice()
    play(choice, best_of(16), 6000)
    play(choice, best_of(1), 6000)
    assert play(choice, best_of(1), 100).count(1) > 80
    play(choice, best_of(16), 6000)
    assert play(choice, best_of(16), 100).count(16) > 80


def test_a_few_long_waits_count() -> None:
    """Of the steps with two threads each fifth waits for a core that is away."""
    choice, steps = ThreadChoice(), iter(range(10**6))

    def cost(threads: int) -> float:
        return 0.001 if threads == 1 else 0.006 if next(steps) % 5 == 0 else 0.0006

    play(choice, cost, 1000, most=2)
    assert play(choice, cost, 1000, most=2).count(1) > 900


def test_what_is_clearly_slower_is_soon_left() -> None:
    assert play(ThreadChoice(), best_of(16), 200, most=16).count(8) <= 2 * 4


def test_long_steps_are_not_tried_out() -> None:
    choice = ThreadChoice()
    assert set(play(choice, lambda threads: 0.030 / threads, 500, most=1)) == {1}
    assert set(play(choice, lambda threads: 0.5 / threads, 500, tokens=2048, most=2)) == {2}


def test_what_is_level_is_left_alone() -> None:
    choice = ThreadChoice()
    play(choice, lambda threads: 0.001, 2000)
    assert play(choice, lambda threads: 0.001, 1000).count(16) > 950


def test_steps_of_other_sizes_have_a_choice_of_their_own() -> None:
    choice = ThreadChoice()
    play(choice, best_of(1), 1000, tokens=1, most=2)
    assert choice.threads(1, 2) == 1
    assert choice.threads(200, 2) == 2


def test_one_thread_is_all_there_is() -> None:
    assert set(play(ThreadChoice(), best_of(1), 500, most=1)) == {1}


def test_never_more_than_the_step_is_worth() -> None:
    choice = ThreadChoice()
    play(choice, best_of(16), 2000, tokens=32, most=16)
    assert max(play(choice, best_of(16), 2000, tokens=33, most=4)) <= 4
    assert max(play(choice, best_of(16), 200, tokens=40, most=2)) <= 2
