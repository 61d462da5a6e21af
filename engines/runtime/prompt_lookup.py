"""Guesses from the text itself: what followed the last time that the same few tokens came.

Prompt lookup decoding (A. Saxena, 2023): where an answer repeats its prompt (summaries, edits of code,
quotes), several tokens come of one step. They are the model's own in any case: a guess is only checked.
"""

from __future__ import annotations

import sys
from array import array

_LONGEST, _SHORTEST = 4, 2  # tokens that must have come before


class PromptLookup:
    """A Drafter."""

    def draft(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """What followed the latest earlier place of the longest run of tokens that ends the text."""
        text = array("i", token_ids).tobytes()
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            place = _latest(text, length)
            if place is not None:
                start = place + length
                return token_ids[start : start + max_tokens]
        return []


class Trust:
    """How many guesses a sequence is worth, each of which a step computes: twice as many as held last time,
    half as many where none did, and where a single one did not, none for a while; the more often, the longer.
    """

    def __init__(self) -> None:
        self._most = sys.maxsize  # until something is known
        self._rest, self._next_rest = 0, 1  # tokens

    @property
    def num_guesses(self) -> int:
        return 0 if self._rest else self._most

    def drew(self, num_guessed: int, num_held: int) -> None:
        """A step of this sequence: so many of the guesses were what the model drew."""
        if not num_guessed:
            self._rest = max(0, self._rest - 1)
        elif num_held:
            self._most, self._next_rest = 2 * num_held, 1
        elif num_guessed > 1:
            self._most = num_guessed // 2
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)


_LONGEST_REST = 32
_SIZE = array("i").itemsize


def _latest(text: bytes, length: int) -> int | None:
    """Where its last `length` tokens came before, in tokens from the start."""
    run = text[-length * _SIZE :]
    end = len(text) - _SIZE  # one token earlier, at the latest
    while len(run) == length * _SIZE:
        at = text.rfind(run, 0, end)
        if at < 0:
            return None
        if at % _SIZE == 0:
            return at // _SIZE
        end = at + len(run) - 1  # between two tokens: no place at all
    return None
