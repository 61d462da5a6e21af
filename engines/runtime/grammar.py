"""What a sequence may say next, by its grammar: sets of tokens, from llguidance. Torch-free; on rank 0.

A grammar is compiled in a thread, so that the engine's loop goes on; its sequence waits in the queue.
Compiled ones are kept for the next sequences, which share their automata: these grow as they are used. Every
grammar is somebody else's text, so llguidance's limits bound what one of them takes: of memory, of a step's
time, and of the time to compile it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engines.bounds import GRAMMAR_LIMITS

MAX_CACHED = 32
"""Compiled grammars that are kept without a sequence."""

LIMITS = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)


class GrammarFailed(ValueError):  # noqa: N818
    """A grammar that cannot be compiled or followed: its request's own fault."""


class Constraint:
    """The grammar of one sequence, and where in it the sequence is."""

    def __init__(self, compiled: Future[LLMatcher], compile_again: Callable[[], LLMatcher]) -> None:
        self._compiled = compiled
        self._compile_again = compile_again
        self._own: LLMatcher | None = None
        self._is_alone = False  # `_own` shares nothing
        self._token_ids: list[int] = []  # taken in so far

    @property
    def is_ready(self) -> bool:
        """Whether it has been compiled, or could not be."""
        return self._compiled.done()

    def follow(self, token_ids: list[int], first: int) -> None:
        """Go on to where the sequence is: from `first` on, `token_ids` are generated.

        Raises GrammarFailed."""
        new = token_ids[first + len(self._token_ids) :]
        self._token_ids += new
        if new and not self._matcher.consume_tokens(new):
            self._start_again()

    def write_mask(self, mask: NDArray[np.uint32], banned_ids: tuple[int, ...]) -> None:
        """Set the bits of the tokens that may come next: those of the grammar but for `banned_ids`; with them
        if there are no others, for then the grammar is complete. Raises GrammarFailed."""
        self._fill(mask)
        if self._matcher.is_error():
            self._start_again()
            self._fill(mask)
            self._check()
        if banned_ids:
            others = mask & ~_bits(banned_ids, len(mask))
            mask[:] = others if others.any() else mask
        if not mask.any():
            raise GrammarFailed("no token of this model can come next")

    def _fill(self, mask: NDArray[np.uint32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    @property
    def _matcher(self) -> LLMatcher:
        if self._own is None:
            self._own = self._compiled.result().deep_copy()
        return self._own

    def _start_again(self) -> None:
        """Its matcher has failed. What it shared may have been used up by others: so once, with nothing
        shared."""
        if not self._is_alone:
            self._is_alone = True
            self._own = self._compile_again()
            self._own.consume_tokens(self._token_ids)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(_first_line(self._matcher.get_error()))


class Grammars:
    """Gives constraints over one model's tokens. `vocab_size` is the width of its logits; what ends a text is
    `eos_token_ids`."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Reads nothing yet: the first grammar pays for the tokenizer."""
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()  # the last used last
        self._thread = ThreadPoolExecutor(1, "grammar")

    def begin(self, grammar: str) -> Constraint:
        """For a new sequence. Returns at once; see `is_ready`."""
        compiled = self._compiled.pop(grammar, None) or self._thread.submit(self._compile, grammar)
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)
        return Constraint(compiled, lambda: self._compile_again(grammar))

    def _compile_again(self, grammar: str) -> LLMatcher:
        self._compiled.pop(grammar, None)
        return self._compile(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        try:
            self._tokenizer = self._tokenizer or self._load_tokenizer()
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        except GrammarFailed:
            raise
        except BaseException as panic:  # Rust's are no Exceptions
            raise GrammarFailed(f"llguidance failed: {type(panic).__name__}") from panic
        if matcher.is_error():
            raise GrammarFailed(_first_line(matcher.get_error()))
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        if not self._eos_token_ids:
            raise GrammarFailed("this model has no end token, so no text of it can be complete")
        try:
            text = self._tokenizer_file.read_text(encoding="utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except (OSError, ValueError) as error:
            raise GrammarFailed(f"{self._tokenizer_file.name} cannot be read: {error}") from error


def token_masks(rows: list[tuple[Constraint, tuple[int, ...]]], vocab_size: int) -> NDArray[np.uint32]:
    """[R, vocab_size / 32], bit i of word w for token 32 * w + i: set where the constraint of a row allows
    it. Beside a constraint stand the ids that are banned all the same. Raises GrammarFailed."""
    masks = np.empty((len(rows), -(-vocab_size // 32)), np.uint32)
    for mask, (constraint, banned_ids) in zip(masks, rows, strict=True):
        constraint.write_mask(mask, banned_ids)
    return masks


def _bits(token_ids: tuple[int, ...], num_words: int) -> NDArray[np.uint32]:
    ids = np.array(token_ids, np.uint32)
    mask = np.zeros(num_words, np.uint32)
    np.bitwise_or.at(mask, ids >> 5, np.uint32(1) << (ids & 31))
    return mask


def _first_line(message: str) -> str:
    return message.partition("\n")[0][:500]
