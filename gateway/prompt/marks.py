"""Control tokens that an answer's reader has to see, in a text that can spell none of them.

Models begin tool calls and thoughts with marks such as `[TOOL_CALLS]`. Where such a mark is a control token,
decoding leaves it out; and if it were shown as its text, a model that repeats what a user wrote could forge
it. So it is shown as a single noncharacter, one of 32 that Unicode keeps free for such use; those that a
model writes itself become U+FFFD. Where the mark is ordinary text to the tokenizer, it is its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from gateway.prompt.tokenizer import Tokenizer

_FIRST = 0xFDD0
MAX_MARKS = 32
_FORGED = dict.fromkeys(range(_FIRST, _FIRST + MAX_MARKS), "\ufffd")
_HIDDEN = dict.fromkeys(range(_FIRST, _FIRST + MAX_MARKS))


class Marks:
    """The marks of one model."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        found = {text: tokenizer.control_id(text) for text in texts}
        control = {text: id for text, id in found.items() if id is not None}
        assert len(control) <= MAX_MARKS
        self._ids = control
        self._char_of_text = {text: chr(_FIRST + place) for place, text in enumerate(control)}
        self._char_of_id = {id: self._char_of_text[text] for text, id in control.items()}

    def spell(self, text: str) -> str:
        """What to look for in the decoded text."""
        return self._char_of_text.get(text, text)

    def grammar(self, text: str) -> str:
        """The mark in a Lark grammar: the control token's id, or its text."""
        id = self._ids.get(text)
        return json.dumps(text, ensure_ascii=False) if id is None else f"<[{id}]>"

    def text_of(self, id: int) -> str | None:
        """As Tokenizer.text_of, and the marks."""
        if id in self._char_of_id:
            return self._char_of_id[id]
        text = self._tokenizer.text_of(id)
        return text if text is None or text.isascii() else _without_forged(text)

    def decode(self, ids: list[int]) -> str:
        """As Tokenizer.decode, and the marks."""
        if self._char_of_id.keys().isdisjoint(ids):
            return _without_forged(self._tokenizer.decode(ids))
        parts: list[str] = []
        plain: list[int] = []
        for id in ids:
            if (char := self._char_of_id.get(id)) is None:
                plain.append(id)
                continue
            parts += [_without_forged(self._tokenizer.decode(plain)), char]
            plain = []
        return "".join([*parts, _without_forged(self._tokenizer.decode(plain))])


def hide_marks(text: str) -> str:
    """The text as it is shown: control tokens never are."""
    return text if text.isascii() else text.translate(_HIDDEN)


def _without_forged(text: str) -> str:
    return text if text.isascii() else text.translate(_FORGED)
