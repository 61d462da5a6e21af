"""How many threads take a step, by measurement.

Two take half the time of one, unless something else wants their cores: then each waits for the other dozens
of times a step, and for as long as the other's core is away. With a small model the gateway that sends its
tokens is such a thing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Rival:
    """What was measured of a number of threads, in a row."""

    threads: int
    steps: int = 0
    seconds: float = 0.0

    @property
    def is_measured(self) -> bool:
        return self.steps >= _STEPS

    @property
    def mean(self) -> float:
        """The mean, not the median: the rare long waits are what counts."""
        return self.seconds / self.steps

    def is_beaten_by(self, other: _Rival) -> bool:
        """Whether there is no need to measure on."""
        return self.steps >= _STEPS_AT_LEAST and self.mean > _CLEARLY * other.mean


class _Trial:
    """For steps of about the same size: the number in use, and now and then a few steps with another."""

    def __init__(self, threads: int) -> None:
        self.used = _Rival(threads)
        self.other: _Rival | None = None
        self._goes_up = False
        self._wait = self._rest = _LEAST_WAIT

    def threads(self, most: int) -> int:
        if self.other is None and self._rest <= 0 and self.used.mean < _LONG_STEP:
            self._start(most)
        rival = self.other or self.used
        return min(rival.threads, most)

    def _start(self, most: int) -> None:
        """Half as many the one time, twice as many the other."""
        threads = self.used.threads
        other = min(most, 2 * threads) if self._goes_up else max(1, threads // 2)
        self._goes_up = not self._goes_up
        if other != threads:
            self.other = _Rival(other)

    def took(self, threads: int, seconds: float) -> None:
        rival = self.other or self.used
        if threads != rival.threads:
            return
        if rival is self.used:
            self._rest -= 1
            if rival.is_measured:  # only the last steps are compared
                rival.steps, rival.seconds = _STEPS - 1, rival.mean * (_STEPS - 1)
        rival.steps += 1
        rival.seconds += seconds
        if rival is not self.used and (rival.is_measured or rival.is_beaten_by(self.used)):
            self._decide(rival)

    def _decide(self, other: _Rival) -> None:
        is_better = other.mean < _GAIN * self.used.mean
        self._wait = _LEAST_WAIT if is_better else min(2 * self._wait, _MOST_WAIT)
        self.used, self.other = (other if is_better else _Rival(self.used.threads)), None
        self._rest = self._wait


class ThreadChoice:
    """The number that takes the least time for steps of so many tokens, tried out beside the one in use."""

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = {}

    def threads(self, num_tokens: int, most: int) -> int:
        """For the next step, `most` at most, which is also what the first steps take."""
        trial = self._trials.get(num_tokens.bit_length())
        if trial is None:
            trial = self._trials[num_tokens.bit_length()] = _Trial(most)
        return trial.threads(most)

    def took(self, num_tokens: int, threads: int, seconds: float) -> None:
        """How long a step of so many tokens lasted with so many threads."""
        self._trials[num_tokens.bit_length()].took(threads, seconds)


_STEPS, _STEPS_AT_LEAST = 8, 2
"""That a number of threads is measured over: fewer if it is clearly the slower."""
_CLEARLY = 1.25
_GAIN = 0.95
"""Of the time: what is level is left as it is."""
_LEAST_WAIT, _MOST_WAIT = 24, 1024
"""Steps from a trial to the next: twice as many each time that nothing came of it."""
_LONG_STEP = 0.02
"""Seconds. Beside such a one the threads' waits for each other are short."""
