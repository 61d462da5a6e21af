"""What a chat template is rendered over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Json = Any
"""What JSON can say: None, bool, numbers, str, lists and dicts of these."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Names that a template knows these parts by: no other variable may have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages as templates know them, and what else the template may ask for.

    Neither generation prompt nor continuation: the prompt ends as the last message does.
    """

    messages: Sequence[Mapping[str, Json]]
    tools: Sequence[Mapping[str, Json]] | None = None  # {"type": "function", "function": {...}}
    variables: Mapping[str, Json] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message's content goes on where it ends

    @property
    def num_chars(self) -> int:
        """Of everything that somebody else has written."""
        return sum(map(len, _strings([self.messages, self.tools, self.variables])))

    def map_strings(self, change: Callable[[str], str]) -> Conversation:
        """The same with every string changed, keys and what is nested deep included."""
        return replace(
            self,
            messages=_mapped(self.messages, change),
            tools=_mapped(self.tools, change),
            variables={name: _mapped(value, change) for name, value in self.variables.items()},
        )


def _strings(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _mapped(value: Json, change: Callable[[str], str]) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(inner, change) for inner in value]
    return value
