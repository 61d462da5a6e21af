"""One sequence, from the request to the end of its text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from engines.wire import Generate, RequestError
from gateway.choice import ChoiceAssembler, ChoiceDelta
from gateway.metrics import ModelMetrics, SequenceTimer
from gateway.recovery import Recovery
from gateway.router import ServedModel
from gateway.scoring import PromptScoring


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

    @property
    def num_tokens(self) -> int:
        return self._assembler.num_tokens

    @property
    def mean_logprob(self) -> float:
        return self._assembler.mean_logprob

    async def deltas(self, metrics: ModelMetrics) -> AsyncGenerator[ChoiceDelta, None]:
        """Ends after the delta with the finish reason, and aborts what is left of the sequence."""
        timer = SequenceTimer(metrics)
        reason, has_report = "abort", False
        recovery = Recovery(self._model, self.wire, metrics, self._cache_key)
        try:
            async with aclosing(recovery.deltas()) as source:
                async for delta in source:
                    if delta.error is not None:
                        raise _request_error(delta.error)
                    if delta.num_cached_tokens is not None:
                        self.num_cached_tokens = delta.num_cached_tokens
                    if delta.prompt_logprobs and self._scoring is not None:
                        self._scoring.take(delta.prompt_logprobs)
                    if delta.token_ids:
                        timer.on_tokens(len(delta.token_ids))
                    elif delta.finish_reason is None:
                        continue
                    if self.wire.prompt_logprobs is not None:
                        self._require_scores()
                    new = self._assembler.feed(delta)
                    if self._scoring is not None and not has_report:
                        report, has_report = await self._scoring.report(), True
                        new = msgspec.structs.replace(new, prompt=report)
                    if new.text or new.logprobs or new.finish_reason or new.prompt:
                        if new.finish_reason:
                            reason = new.finish_reason
                        yield new
                        if new.finish_reason:
                            return
            raise SequenceFailed("the group ended the sequence without a finish reason")
        except Exception:
            reason = "error"
            raise
        finally:
            timer.on_end(reason)

    def _require_scores(self) -> None:
        """The prompt's log-probabilities come before any token."""
        if self._scoring is not None and not self._scoring.is_scored:
            raise SequenceFailed("the group generates, but has not scored the prompt")


def _request_error(error: RequestError) -> Exception:
    kinds: dict[str, Callable[[str], Exception]] = {
        "invalid_request": SequenceRefused,
        "too_long": ContextLengthExceeded,
        "internal": SequenceFailed,
    }
    return kinds[error.code](error.message)
