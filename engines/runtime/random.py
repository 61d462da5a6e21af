"""Uniform draws that depend only on (seed, choice, position): Philox4x32-10, vectorised.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Counter-based: a
draw needs no state, so preemption, batch-mates, layout and restarts cannot change it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox4x32(counter: Sequence[UInt64], key: Sequence[UInt64]) -> tuple[UInt64, ...]:
    """Ten rounds. `counter` is four arrays of 32-bit words, `key` two; so is the result, four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One draw in [0, 1) with 53 bits for each (seed of 64 bits, choice, position)."""
    seed = np.array(seeds, np.uint64)
    position = np.array(positions, np.uint64)
    choice = np.array(choices, np.uint64)
    zero = np.zeros_like(seed)
    counter = (position & _LOW, position >> _SHIFT, choice & _LOW, zero)
    high, low, *_ = philox4x32(counter, (seed & _LOW, seed >> _SHIFT))
    bits = ((high << _SHIFT) | low) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
