"""One choice: its tokens to text, and what is new of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engines.wire import TokenDelta, TokenLogprob
from gateway.prompt.detokenize import Decoder, Detokenizer, StopStrings
from gateway.prompt.tokenizer import Tokenizer
from gateway.protocol.common import LOWEST_LOGPROB, GenerationParams, PromptReport, TokenInfo


class ChoiceDelta(msgspec.Struct, frozen=True, gc=False):
    """What is new of one choice. The last one has a finish reason. (Made for each token: a msgspec.Struct is
    made five times as fast as a frozen dataclass.)"""

    index: int
    text: str
    logprobs: list[TokenInfo] | None  # None when not asked for
    finish_reason: str | None = None
    prompt: PromptReport | None = None  # with the first one, when asked for
    num_tokens: int = 0  # so far, whether they show or not
    stop_string: str | None = None  # that has ended it


class ChoiceAssembler:
    """Token deltas of one choice to text: characters made whole, stop strings looked for.

    A token's logprob is held back until all of its text has been shown, and left out when a stop
    string cut it off: logprobs spell tokens too.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: GenerationParams,
        context: Sequence[int],
        text_offset: int = 0,
        decoder: Decoder | None = None,
    ) -> None:
        """`context`: the ids before the first one, if the text continues theirs; `text_offset`: how many
        characters are shown before its own; `decoder` in place of the tokenizer."""
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(decoder or tokenizer, context)
        self._stops = StopStrings(params.stop, include=params.include_stop) if params.stop else None
        self._include_stop = params.include_stop
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.logprobs is not None
        # Nothing is looked for in the text, nothing told or ranked of its tokens: as nearly always.
        self.is_plain = self._stops is None and not self._wants_logprobs and params.best_of is None
        self._has_end_logprob = params.has_end_logprob and params.logprobs is not None
        self._num_top = params.logprobs or 0
        self._num_decoded = self._num_shown = text_offset  # characters
        self._held: list[tuple[int, TokenInfo]] = []  # (characters decoded with it, token)
        self._sum_logprobs = 0.0
        self.num_tokens = 0

    @property
    def mean_logprob(self) -> float:
        """Of the tokens so far, if the group was asked for their log-probabilities."""
        return self._sum_logprobs / max(self.num_tokens, 1)

    def feed(self, delta: TokenDelta) -> ChoiceDelta:
        """What can be shown now. After a finish reason nothing more may be fed."""
        if self.is_plain and delta.finish_reason is None:
            self.num_tokens += len(delta.token_ids)
            text = self._detokenizer.push(delta.token_ids)
            return ChoiceDelta(self._index, text, None, num_tokens=self.num_tokens)
        num_before = self.num_tokens
        new = self._feed(delta)
        for value in delta.logprobs[: self.num_tokens - num_before]:
            self._sum_logprobs += value.logprob
        return new

    def _feed(self, delta: TokenDelta) -> ChoiceDelta:
        is_end_hidden = delta.is_stop_token and not self._include_stop
        visible = delta.token_ids[:-1] if is_end_hidden else delta.token_ids
        text, is_stopped = self._push(visible, delta.logprobs)
        if is_stopped:
            return self._shown(text, "stop")
        self.num_tokens += len(delta.token_ids) - len(visible)
        if delta.finish_reason is None:
            return self._shown(text)
        end, is_stopped = self._end()
        text += end
        if is_end_hidden and self._has_end_logprob and not is_stopped:
            self._hold(delta.token_ids[-1], delta.logprobs[-1], 0)
        return self._shown(text, "stop" if is_stopped else delta.finish_reason)

    def _shown(self, text: str, reason: str | None = None) -> ChoiceDelta:
        logprobs = self._release(len(text))
        found = self._stops.found if self._stops is not None else None
        return ChoiceDelta(self._index, text, logprobs, reason, num_tokens=self.num_tokens, stop_string=found)

    def _push(self, ids: list[int], logprobs: list[TokenLogprob]) -> tuple[str, bool]:
        if self._stops is None and not self._wants_logprobs:
            self.num_tokens += len(ids)
            return self._detokenizer.push(ids), False
        shown = ""
        for place, id in enumerate(ids):  # one at a time: to know which token a stop string ends at
            self.num_tokens += 1
            new = self._detokenizer.push((id,))
            if self._wants_logprobs:
                self._hold(id, logprobs[place], len(new))
            self._num_decoded += len(new)
            text, is_stopped = self._check_stops(new)
            shown += text
            if is_stopped:
                return shown, True
        return shown, False

    def _check_stops(self, text: str) -> tuple[str, bool]:
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text, False
        return self._stops.push(text)

    def _end(self) -> tuple[str, bool]:
        """The text that was held back for what might have followed."""
        rest = self._detokenizer.flush()
        self._num_decoded += len(rest)
        text, is_stopped = self._check_stops(rest)
        if self._stops is not None and not is_stopped:
            text += self._stops.flush()
        return text, is_stopped

    def _hold(self, id: int, logprob: TokenLogprob, num_chars: int) -> None:
        top = tuple(
            (self._tokenizer.token_bytes(other), max(value, LOWEST_LOGPROB))
            for other, value in logprob.top[: self._num_top]
        )
        own = max(logprob.logprob, LOWEST_LOGPROB)
        info = TokenInfo(self._tokenizer.token_bytes(id), own, top, self._num_decoded)
        self._held.append((self._num_decoded + num_chars, info))

    def _release(self, num_new: int) -> list[TokenInfo] | None:
        if not self._wants_logprobs:
            return None
        self._num_shown += num_new
        count = sum(1 for end, _ in self._held if end <= self._num_shown)
        ready, self._held = self._held[:count], self._held[count:]
        return [info for _, info in ready]


class CollectedChoice:
    """A choice put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.logprobs: list[TokenInfo] | None = None
        self.finish_reason = ""
        self.prompt: PromptReport | None = None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, delta: ChoiceDelta) -> None:
        self._texts.append(delta.text)
        if delta.prompt is not None:
            self.prompt = delta.prompt
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
