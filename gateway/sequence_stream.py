"""One sequence, from the request to the end of its text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from engines.wire import Generate, RequestError, TokenDelta
from gateway.choice import ChoiceAssembler, ChoiceDelta
from gateway.direct import Direct
from gateway.metrics import ModelMetrics, SequenceTimer
from gateway.recovery import Recovery
from gateway.router import ServedModel
from gateway.scoring import PromptScoring
from gateway.workers.protocol import Take


class ContextLengthExceeded(ValueError):  # noqa: N818
    """Prompt and answer together are longer than the model's context."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class SequenceRefused(ValueError):  # noqa: N818
    """The group refused one sequence, for a reason that is in the request."""


class SequenceFailed(Exception):  # noqa: N818
    """One sequence failed in the group while the group went on."""


class SequenceStream:
    """One choice of one prompt: a sequence, in whatever group it is, and its text. Nothing is sent before
    `deltas` is iterated."""

    def __init__(
        self,
        model: ServedModel,
        wire: Generate,
        assembler: ChoiceAssembler,
        scoring: PromptScoring | None = None,
        *,
        cache_key: str = "",
    ) -> None:
        """`scoring`: of the prompt, whose report comes before the text. Sequences with equal cache keys go to
        one group, as far as its load allows."""
        self._model = model
        self.wire = wire
        self._assembler = assembler
        self._scoring = scoring
        self._cache_key = cache_key
        self.num_cached_tokens = 0
        self._failure: Exception | None = None  # on the short way

    @property
    def num_tokens(self) -> int:
        return self._assembler.num_tokens

    @property
    def mean_logprob(self) -> float:
        return self._assembler.mean_logprob

    async def deltas(
        self, metrics: ModelMetrics, direct: Direct | None = None
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """What is new, in one list what is ready together. Ends after the delta with the finish reason, and
        aborts what is left of the sequence. What `direct` can show at once does not come from here."""
        timer = SequenceTimer(metrics)
        reason, has_report = "abort", False
        recovery = Recovery(self._model, self.wire, metrics, self._cache_key)
        try:
            async with aclosing(recovery.deltas(self._taker(direct, timer))) as batches:
                async for batch in batches:
                    if self._failure is not None:
                        raise self._failure
                    num_before = self.num_tokens
                    new, failure = self._read(batch)
                    if count := self.num_tokens - num_before:
                        timer.on_tokens(count)
                    if new and self._scoring is not None and not has_report:
                        report, has_report = await self._scoring.report(), True
                        new[0] = msgspec.structs.replace(new[0], prompt=report)
                    if new:
                        reason = new[-1].finish_reason or reason
                        yield new
                        if new[-1].finish_reason:
                            return
                    if failure is not None:
                        raise failure
            raise SequenceFailed("the group ended the sequence without a finish reason")
        except Exception:
            reason = "error"
            raise
        finally:
            timer.on_end(reason)

    def _taker(self, direct: Direct | None, timer: SequenceTimer) -> Take | None:
        """What deals with tokens that come when everything waits for them, if nothing but their text is of
        interest."""
        if direct is None or self._scoring is not None or not self._assembler.is_plain:
            return None

        def take(delta: TokenDelta) -> bool:
            if not (direct.is_open and _is_tokens_alone(delta)):
                return False
            try:
                direct.show(self._assembler.feed(delta))
            except Exception as error:  # in the connection's turn of the loop; the request is what has failed
                self._failure = error
                return False
            timer.on_tokens(len(delta.token_ids))
            return True

        return take

    def _read(self, batch: list[TokenDelta]) -> tuple[list[ChoiceDelta], Exception | None]:
        """What of them is to be shown, up to the end of the text; and what went wrong behind that."""
        shown: list[ChoiceDelta] = []
        for delta in batch:
            if delta.error is not None:
                return shown, request_error(delta.error)
            if delta.num_cached_tokens is not None:
                self.num_cached_tokens = delta.num_cached_tokens
            if delta.prompt_logprobs and self._scoring is not None:
                self._scoring.take(delta.prompt_logprobs)
            if not delta.token_ids and delta.finish_reason is None:
                continue
            if self.wire.prompt_logprobs is not None:
                self._require_scores()
            new = self._assembler.feed(delta)
            if new.text or new.logprobs or new.finish_reason:
                shown.append(new)
            if new.finish_reason:
                break
        return shown, None

    def _require_scores(self) -> None:
        """The prompt's log-probabilities come before any token."""
        if self._scoring is not None and not self._scoring.is_scored:
            raise SequenceFailed("the group generates, but has not scored the prompt")


def _is_tokens_alone(delta: TokenDelta) -> bool:
    """Neither the first of a sequence nor the last."""
    return (
        delta.finish_reason is None
        and delta.error is None
        and delta.num_cached_tokens is None
        and bool(delta.token_ids)
    )


def request_error(error: RequestError) -> Exception:
    """What a sequence that failed in its group raises here."""
    kinds: dict[str, Callable[[str], Exception]] = {
        "invalid_request": SequenceRefused,
        "too_long": ContextLengthExceeded,
        "internal": SequenceFailed,
    }
    return kinds[error.code](error.message)
