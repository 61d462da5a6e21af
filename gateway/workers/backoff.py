"""How long to wait before a group that died is started again."""

from __future__ import annotations

import math

MAX_BACKOFF_SECONDS = 30
HEALTHY_SECONDS = 60.0  # ready for this long: the next death counts as the first
MAX_RETRY_AFTER = 60


def backoff_seconds(num_failures: int) -> float:
    """The wait after the num_failures-th death in a row (1 or more): 0, 1, 1, 2, 3, 5, 8, ... 30."""
    current, following = 0, 1
    for _ in range(num_failures - 1):
        current, following = following, min(current + following, MAX_BACKOFF_SECONDS)
    return current


def retry_after(expected_at: float, now: float) -> int:
    """Whole seconds until `expected_at`, for a Retry-After header: at least 1, at most a minute."""
    return min(max(math.ceil(expected_at - now), 1), MAX_RETRY_AFTER)
