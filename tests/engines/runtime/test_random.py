"""The generator against the authors' known answers, and what sampling relies on."""

from __future__ import annotations

import numpy as np
import pytest

from engines.runtime.random import philox4x32, uniforms

# kat_vectors of Random123: philox4x32, 10 rounds.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    def words(values: list[int]) -> list[np.ndarray]:
        return [np.array([v], np.uint64) for v in values]

    assert [int(word[0]) for word in philox4x32(words(counter), words(key))] == expected


def test_a_draw_depends_on_its_own_key_only() -> None:
    alone = uniforms([2**63 + 5], [3], [70])
    together = uniforms([1, 2**63 + 5, 9], [0, 3, 1], [5, 70, 2])
    assert alone[0] == together[1]


def test_neighbouring_keys_differ() -> None:
    draws = uniforms([7, 8, 7, 7], [0, 0, 1, 0], [1, 1, 1, 2])
    assert len(set(draws.tolist())) == 4


def test_draws_are_uniform() -> None:
    draws = uniforms([42] * 20_000, [0] * 20_000, range(20_000))
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
    assert chi_square < 43.8  # 0.1 % of samples are above it at 19 degrees of freedom
