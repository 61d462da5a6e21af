"""What an answer tells of its prompt: the text, and the log-probabilities that its group gives the tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engines.wire import TokenLogprob
from gateway.prompt.tokenizer import Tokenizer
from gateway.prompts import Prompt
from gateway.protocol.common import LOWEST_LOGPROB, PromptReport, PromptToken

LARGE_REPORT = 4_096
"""From so many log-probabilities on a report is made in a thread: some milliseconds on the event loop."""


class PromptScoring:
    """One prompt's report, made once for all of its choices.

    Only the first choice's sequence is scored: `take` gets its log-probabilities as they come.
    """

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer, num_top: int | None) -> None:
        """`num_top`: how many of the likeliest tokens at each place; None: no log-probabilities."""
        self._prompt, self._tokenizer, self._num_top = prompt, tokenizer, num_top
        self._scores: list[TokenLogprob | None] = []
        self._is_scored = asyncio.Event()
        if num_top is None:
            self._is_scored.set()
        self._report: asyncio.Task[PromptReport] | None = None

    @property
    def num_chars(self) -> int:
        return len(self._prompt.text)

    @property
    def is_scored(self) -> bool:
        return self._is_scored.is_set()

    def take(self, scores: Sequence[TokenLogprob | None]) -> None:
        """Those of the next tokens."""
        self._scores += scores
        if len(self._scores) == len(self._prompt.ids):
            self._is_scored.set()

    async def report(self) -> PromptReport:
        """Waits until the prompt is scored."""
        await self._is_scored.wait()
        if self._report is None:
            self._report = asyncio.create_task(self._make())
        return await asyncio.shield(self._report)

    async def _make(self) -> PromptReport:
        if self._num_top is None:
            return PromptReport(self._prompt.text, None)
        if len(self._scores) * (1 + self._num_top) < LARGE_REPORT:
            return PromptReport(self._prompt.text, self._tokens())
        return PromptReport(self._prompt.text, await asyncio.to_thread(self._tokens))

    def _tokens(self) -> list[PromptToken]:
        token_bytes = self._tokenizer.token_bytes
        tokens = []
        for id, offset, score in zip(self._prompt.ids, self._prompt.offsets, self._scores, strict=True):
            tokens.append(PromptToken(id, token_bytes(id), offset, *self._scores_of(score)))
        return tokens

    def _scores_of(
        self, score: TokenLogprob | None
    ) -> tuple[float | None, Sequence[tuple[int, bytes, float]]]:
        if score is None:
            return None, ()
        spell = self._tokenizer.token_bytes
        top = [(id, spell(id), max(logprob, LOWEST_LOGPROB)) for id, logprob in score.top]
        return max(score.logprob, LOWEST_LOGPROB), top
