"""Text as it comes: put together it is the whole text, and no stop string shows in any part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.prompt.detokenize import MAX_SILENT_TOKENS, Decoder, Detokenizer, StopStrings
from gateway.prompt.tokenizer import Tokenizer
from tests.gateway.serving import make_model_dir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_model_dir(tmp_path_factory.mktemp("model")) / "tokenizer.json")


@dataclass
class Windowed:
    """A decoder that knows no token's text by itself."""

    decode: Callable[[list[int]], str]

    def text_of(self, id: int) -> str | None:
        return None


@pytest.fixture(scope="module", params=["token by token", "windowed"])
def decoder(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    if request.param == "windowed":
        return Windowed(tokenizer.decode)
    assert tokenizer.text_of(tokenizer.encode("a", add_special_tokens=False)[0]) == "a"
    assert tokenizer.text_of(tokenizer.encode("🦆", add_special_tokens=False)[0]) is None
    return tokenizer


@settings(max_examples=200)
@given(st.text(max_size=40), st.integers(1, 5))
def test_the_parts_are_the_text_and_no_character_is_split(
    tokenizer: Tokenizer, decoder: Decoder, text: str, step: int
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(decoder)
    parts = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(parts) + detokenizer.flush() == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 380), max_size=80))
def test_any_tokens_even_garbage_come_out_as_decoded_whole(
    tokenizer: Tokenizer, decoder: Decoder, ids: list[int]
) -> None:
    detokenizer = Detokenizer(decoder)
    text = "".join(detokenizer.push([id]) for id in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids)


def test_a_character_cut_short_at_the_end_is_shown_as_such(tokenizer: Tokenizer, decoder: Decoder) -> None:
    *ids, _ = tokenizer.encode("a🦆", add_special_tokens=False)
    detokenizer = Detokenizer(decoder)
    assert [detokenizer.push([id]) for id in ids] == ["a"] + [""] * (len(ids) - 1)
    assert detokenizer.flush() == "\ufffd"


def test_the_window_stays_short_whatever_comes(tokenizer: Tokenizer) -> None:
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    detokenizer = Detokenizer(Windowed(decode))
    [end] = tokenizer.encode("<|end|>", add_special_tokens=False)
    [byte] = tokenizer.encode("🦆", add_special_tokens=False)[:1]
    for id in [end] * 500 + [byte] * 500:
        detokenizer.push([id])
    assert longest <= 2 * MAX_SILENT_TOKENS


def test_context_keeps_the_space_of_the_first_word() -> None:
    words = {1: " Hello", 2: " world"}

    def decode(ids: list[int]) -> str:  # as SentencePiece: the first space of a text is not its own
        return "".join(words[id] for id in ids).removeprefix(" ")

    assert Detokenizer(Windowed(decode)).push([2]) == "world"
    assert Detokenizer(Windowed(decode), context=[1]).push([2]) == " world"


@settings(max_examples=500)
@given(
    st.lists(st.text("ab<|", max_size=4), max_size=12),
    st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_text_ends_before_the_first_stop_string(parts: list[str], stops: list[str]) -> None:
    checker = StopStrings(stops)
    shown, is_stopped, seen = "", False, ""
    for part in parts:
        seen += part
        new, is_stopped = checker.push(part)
        shown += new
        assert not any(stop in shown for stop in stops)
        if is_stopped:
            break
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert is_stopped == bool(places)
    assert shown + checker.flush() == (seen[: min(places)] if places else seen)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopStrings(["END", "STOP"])
    assert checker.push("an EN") == ("an ", False)
    assert checker.push("ORMOUS S") == ("ENORMOUS ", False)
    assert checker.push("TO") == ("", False)
    assert checker.flush() == "STO"
