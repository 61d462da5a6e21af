"""Whatever an answer consists of: its blocks begin, grow and end one after another, and lose nothing."""

from __future__ import annotations

import json
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from gateway.answer.events import Arguments, CallStart, Content, Event, Reasoning
from gateway.protocol.anthropic_response import BlockDelta, BlockStart, BlockStop, TextBlock, ThinkingBlock
from gateway.routes.messages_blocks import BlockReader, BlockWriter

TEXTS = st.text(min_size=1, max_size=5)
PIECES = st.one_of(TEXTS.map(Content), TEXTS.map(Reasoning), st.dictionaries(TEXTS, TEXTS, max_size=2))


def events_of(pieces: list[Content | Reasoning | dict[str, str]]) -> list[Event]:
    """Each dictionary is a call, whose arguments come character by character."""
    events: list[Event] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, dict):
            events.append(CallStart(number, f"call_{number}", "f"))
            events += [Arguments(number, char) for char in json.dumps(piece)]
        else:
            events.append(piece)
    return events


@given(st.lists(PIECES, max_size=8), st.integers(1, 5))
def test_blocks(pieces: list[Content | Reasoning | dict[str, str]], size: int) -> None:
    events = events_of(pieces)
    writer, reader = BlockWriter(), BlockReader()
    told = [
        one for start in range(0, len(events), size) for one in writer.write(events[start : start + size])
    ]
    told += writer.end()
    reader.add(told)
    shape = [(one.index, type(one)) for one in told]
    found = [[kind for _, kind in same] for _, same in groupby(shape, lambda one: one[0])]
    assert [index for index, _ in groupby(shape, lambda one: one[0])] == list(range(len(found)))
    for kinds in found:
        assert kinds == [BlockStart, *[BlockDelta] * (len(kinds) - 2), BlockStop]
    expected: list[object] = []
    for kind, same in groupby(
        enumerate(pieces), lambda one: one[0] if isinstance(one[1], dict) else type(one[1])
    ):
        group = [piece for _, piece in same]
        texts = "".join(piece.text for piece in group if not isinstance(piece, dict))
        expected.append(group[0] if isinstance(kind, int) else (kind.__name__, texts))
    assert expected == [
        ("Content", block.text)
        if isinstance(block, TextBlock)
        else ("Reasoning", block.thinking)
        if isinstance(block, ThinkingBlock)
        else block.input
        for block in reader.blocks()
    ]
