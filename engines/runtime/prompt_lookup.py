"""Guesses from the text itself: what followed the last time that the same few tokens came.

Prompt lookup decoding (A. Saxena, 2023): where an answer repeats its prompt (summaries, edits of code,
quotes), several tokens come of one step. They are the model's own in any case: a guess is only checked.
"""

from __future__ import annotations

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
