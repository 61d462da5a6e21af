"""Who asks: the holder of one API key, or everybody where there are no keys; and what they may use."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

_BUSY_RETRY_SECONDS = 1


class RateLimited(Exception):  # noqa: N818
    """The key has used what it may. `retry_after` in whole seconds, 1 or more."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LargerThanLimit(Exception):  # noqa: N818
    """One request is more than the key's limit for a minute: it can never pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a key may use; None: as much as it wants. A minute begins with its first request."""

    concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, counted when sent, and of answers, when they end


UNLIMITED = Limits()


class Tenant:
    """One key's holder. `name` is for logs, metrics and fairness; equal salts share prefix blocks."""

    def __init__(self, name: str, cache_salt: bytes, limits: Limits = UNLIMITED) -> None:
        self.name = name
        self.cache_salt = cache_salt
        self.num_requests = 0  # underway
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """What has been counted this minute stays when neither rate changes."""
        self._max_concurrent = limits.concurrent_requests
        self._requests = _Rate.of(limits.requests_per_minute, getattr(self, "_requests", None))
        self._tokens = _Rate.of(limits.tokens_per_minute, getattr(self, "_tokens", None))

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, for as long as the context lasts. Raises RateLimited."""
        if self._max_concurrent is not None and self.num_requests >= self._max_concurrent:
            raise RateLimited(
                f"This API key may have {self._max_concurrent} requests underway at once.",
                _BUSY_RETRY_SECONDS,
            )
        if self._requests is not None:
            self._requests.take(1, "requests")
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """Raises RateLimited while the minute's tokens don't suffice, LargerThanLimit if they never will."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, "tokens")

    def count_answer(self, num_tokens: int) -> None:
        """Tokens that were generated. They may go over the limit; then the next prompt is refused."""
        if self._tokens is not None and num_tokens:
            self._tokens.count(num_tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit-*, for the rates that are limited."""
        return {
            f"x-ratelimit-{field}-{what}": value
            for what, rate in self._rates()
            for field, value in rate.describe().items()
        }

    def anthropic_headers(self) -> dict[str, str]:
        """The same as anthropic-ratelimit-*, which say when a minute ends, not how soon."""
        return {
            f"anthropic-ratelimit-{what}-{field}": value
            for what, rate in self._rates()
            for field, value in (rate.describe() | {"reset": rate.reset_at()}).items()
        }

    def _rates(self) -> Iterator[tuple[str, _Rate]]:
        for what, rate in (("requests", self._requests), ("tokens", self._tokens)):
            if rate is not None:
                yield what, rate


class _Rate:
    """So many a minute."""

    def __init__(self, amount: int) -> None:
        # It takes a while to import: a gateway without such limits does without.
        from limits import RateLimitItemPerMinute
        from limits.storage import MemoryStorage
        from limits.strategies import FixedWindowRateLimiter

        self.amount = amount
        self._item = RateLimitItemPerMinute(amount)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    @classmethod
    def of(cls, amount: int | None, previous: _Rate | None) -> _Rate | None:
        if previous is not None and previous.amount == amount:
            return previous
        return None if amount is None else cls(amount)

    def take(self, count: int, what: str) -> None:
        if count > self.amount:
            raise LargerThanLimit(
                f"The prompt has {count} {what}; this API key may use {self.amount} {what} a minute."
            )
        if not self._limiter.test(self._item, cost=count):
            seconds = self._seconds_left()
            raise RateLimited(
                f"Rate limit reached: this API key may use {self.amount} {what} a minute."
                f" Please try again in {seconds} s.",
                seconds,
            )
        self.count(count)

    def count(self, count: int) -> None:
        self._limiter.hit(self._item, cost=count)

    def describe(self) -> dict[str, str]:
        remaining = self._limiter.get_window_stats(self._item).remaining
        is_whole = remaining == self.amount
        return {
            "limit": str(self.amount),
            "remaining": str(remaining),
            "reset": "0s" if is_whole else f"{self._seconds_left()}s",
        }

    def reset_at(self) -> str:
        """As RFC 3339: now, if nothing has been used."""
        stats = self._limiter.get_window_stats(self._item)
        at = time.time() if stats.remaining == self.amount else stats.reset_time
        return datetime.fromtimestamp(math.ceil(at), UTC).isoformat().replace("+00:00", "Z")

    def _seconds_left(self) -> int:
        return max(1, math.ceil(self._limiter.get_window_stats(self._item).reset_time - time.time()))
