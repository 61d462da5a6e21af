"""How much of long prompts a step reads beside the sequences that decode, whose next token waits for it."""

from __future__ import annotations

from typing import Protocol


class Pace(Protocol):
    """Asked before each plan, told after it."""

    def prompt_tokens(self, num_decoding: int) -> int:
        """Of long prompts, beside so many sequences (1 or more) that decode. May be 0, but not for long."""

    @property
    def short_prompt(self) -> int:
        """Prompts of up to so many tokens are read whole, and up to so many tokens of them in a step, or more
        while more of them wait than sequences run. 0: there are none such."""

    def took(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """How long a step of these lasted, in seconds."""


class InProportion:
    """For pipelines, where a long plan leaves all stages but one without work: twice as many as the sequences
    of a micro-batch, and at least so many."""

    short_prompt = 0

    def __init__(self, min_tokens: int, num_micro_batches: int) -> None:
        self._min_tokens, self._num_micro_batches = min_tokens, num_micro_batches

    def prompt_tokens(self, num_decoding: int) -> int:
        return max(self._min_tokens, 2 * num_decoding // self._num_micro_batches)

    def took(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """The time of a step says nothing while others are under way."""


class ByStepTime:
    """As many as make a step last `max_slowdown` times as long as without them, by measurement.

    What a token more costs depends on the machine, the model, the batch and the context. So a step without
    prompts is timed now and then, and the number follows the steps with prompts: up by a quarter at most,
    down by half at most, so that one delay of the machine's own is not taken for the rule.
    """

    def __init__(self, max_slowdown: float, short_prompt: int = 256) -> None:
        self.short_prompt = short_prompt
        self._max_slowdown = max_slowdown
        self._tokens = _FIRST_TOKENS
        self._decode_seconds = 0.0
        self._num_decoding = 0  # of the steps that took so long; 0: none yet
        self._num_steps_since = 0

    def prompt_tokens(self, num_decoding: int) -> int:
        if self._num_steps_since >= _STEPS_BETWEEN or not self._is_like(num_decoding):
            return 0
        return int(self._tokens)

    def took(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        if not num_decoding:
            return
        if not num_prompt_tokens:
            self._decoded(num_decoding, seconds)
        elif self._is_like(num_decoding):
            self._num_steps_since += 1
            self._read(num_prompt_tokens, seconds)

    def _is_like(self, num_decoding: int) -> bool:
        """Whether a step of so many sequences takes about as long as the one that was timed."""
        return 4 * self._num_decoding <= 5 * num_decoding and 4 * num_decoding <= 5 * self._num_decoding

    def _decoded(self, num_decoding: int, seconds: float) -> None:
        if self._is_like(num_decoding):
            weight = 1 / 2 if seconds < self._decode_seconds else 1 / 4  # slower: it may be the machine
            seconds = self._decode_seconds + weight * (seconds - self._decode_seconds)
        self._decode_seconds, self._num_decoding, self._num_steps_since = seconds, num_decoding, 0

    def _read(self, num_prompt_tokens: int, seconds: float) -> None:
        more_seconds = max(1e-9, seconds - self._decode_seconds)
        fitting = num_prompt_tokens * (self._max_slowdown - 1) * self._decode_seconds / more_seconds
        if fitting < min(num_prompt_tokens, self._tokens):
            self._tokens = max(_LEAST_TOKENS, fitting, self._tokens / 2)
        elif num_prompt_tokens >= int(self._tokens):  # all that it might: more is worth a try
            self._tokens = min(fitting, 1.25 * self._tokens + 1)


_FIRST_TOKENS, _LEAST_TOKENS = 8.0, 4.0
_STEPS_BETWEEN = 16
"""With prompts, between two without: a sixteenth of their steps is the price of knowing."""
