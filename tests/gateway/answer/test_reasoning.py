"""Thoughts and answers: each text whole, character by character and cut at random gives the same."""

from __future__ import annotations

import pytest

from gateway.answer import reasoning
from gateway.answer.reasoning import FORMATS, state_of
from tests.gateway.answer.reading import cuts, format_of, read, spelled

THINK = FORMATS["think"]
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'

TABLE = [  # text, whether the prompt has opened the tags, reasoning, content
    ("<think>\nHm.\n</think>\n\nYes.", None, "Hm.", "Yes."),
    ("\n <think>Hm.</think>Yes.\n", None, "Hm.", "Yes.\n"),
    ("Hm.\n\nSo.\n</think>\n\nYes.", True, "Hm.\n\nSo.", "Yes."),
    ("<think></think>Yes.", None, "", "Yes."),
    ("</think>\n\nYes.", True, "", "Yes."),
    ("<think>never ends </thin", None, "never ends </thin", ""),
    ("never ends", True, "never ends", ""),
    ("Yes, <think>no</think>.", None, "", "Yes, <think>no</think>."),
    (" \nYes.", None, "", " \nYes."),
    ("<thin", None, "", "<thin"),
    ("", None, "", ""),
    ("", True, "", ""),
    ("<think>a</think>b</think>c", None, "a", "b</think>c"),
    ("<think>a</think>", False, "", "<think>a</think>"),
]


@pytest.mark.parametrize("control", [False, True], ids=["tags-are-text", "tags-are-control-tokens"])
@pytest.mark.parametrize(("text", "is_thinking", "thoughts", "content"), TABLE)
def test_an_answer_in_any_pieces(
    text: str, is_thinking: bool | None, thoughts: str, content: str, control: bool
) -> None:
    format = format_of(tags=THINK, control=control)
    if control:
        thoughts, content = (_without_tags(part) for part in (thoughts, content))
    for pieces in cuts(spelled(format, text)):
        answer = read(format, pieces, is_thinking=is_thinking)
        assert (answer.reasoning, answer.content) == (thoughts, content), pieces


def _without_tags(text: str) -> str:
    return text.replace(THINK.open, "").replace(THINK.close, "")


@pytest.mark.parametrize("control", [False, True])
def test_calls_are_read_behind_thoughts_and_not_within(control: bool) -> None:
    format = format_of("hermes", THINK, control=control)
    text = f"<think>I could {CALL} or not.</think>\n\nLet me see.\n{CALL}"
    for pieces in cuts(spelled(format, text)):
        answer = read(format, pieces, ("now",))
        assert answer.calls == [["now", "{}"]]
        assert answer.content == "Let me see."
        assert answer.reasoning.startswith("I could ")
        assert answer.reasoning.endswith(" or not.")


@pytest.mark.parametrize("name", FORMATS)
def test_every_pair_of_tags(name: str) -> None:
    tags = FORMATS[name]
    assert reasoning.detect(f"{{% if '{tags.close}' in content %}}") == name
    format = format_of(tags=tags)
    for pieces in cuts(f"{tags.open}\nHm.\n{tags.close}\n\nYes."):
        answer = read(format, pieces)
        assert (answer.reasoning, answer.content) == ("Hm.", "Yes.")


def test_the_prompt_says_where_the_answer_begins() -> None:
    assert state_of("<|user|>hi<|assistant|><think>\n", THINK) is True
    assert state_of("<|user|>hi<|assistant|><think>\n\n</think>\n\n", THINK) is False
    assert state_of("<|user|>hi <think> <|assistant|>", THINK) is None
    assert reasoning.detect("{{ messages }}") is None
