"""What a plan's result means for one of its sequences. Common to all batching policies."""

from __future__ import annotations

import numpy as np

from engines.runtime.chunk import Chunk
from engines.runtime.faults import failed
from engines.runtime.plan import StepResult
from engines.runtime.sequence import Sequence
from engines.wire import FinishReason, Pooling, RequestError, TokenDelta, TokenLogprob


def take_result(chunk: Chunk, token_ids: list[int], result: StepResult) -> TokenDelta | None:
    """Give the chunk's sequence its tokens and prompt log-probabilities; None if there is nothing to send.
    Never raises: what fails is that sequence's end.

    `token_ids` are those of `result` as a list. With drafts, those drawn as guessed are accepted, and
    the first that was not: it is what the model drew instead.
    """
    sequence = chunk.sequence
    if result.errors and (error := _first_error(chunk, result)) is not None:
        return end_with(sequence, error)
    if sequence.error is not None:
        return end_with(sequence, sequence.error)
    try:
        return _take_result(chunk, token_ids, result)
    except Exception as error:  # in what it asked for: its own
        return end_with(sequence, failed("taking its result", error))


def end_with(sequence: Sequence, error: RequestError) -> TokenDelta:
    return TokenDelta(id=sequence.request.id, error=error)


def _take_result(chunk: Chunk, token_ids: list[int], result: StepResult) -> TokenDelta | None:
    sequence = chunk.sequence
    if sequence.request.pooling is not None:
        return _take_pooled(chunk, result, sequence.request.pooling)
    if chunk.num_prompt_rows:
        _collect_prompt_logprobs(chunk, result)
    if chunk.samples:
        return _take_tokens(chunk, token_ids, result)
    if chunk.end == sequence.max_len:  # only its prompt was wanted
        return _delta(sequence, [], [], "length")
    return _delta(sequence, [], [], None) if sequence.prompt_logprobs else None


def has_ended(delta: TokenDelta) -> bool:
    return delta.finish_reason is not None or delta.error is not None


def _take_tokens(chunk: Chunk, token_ids: list[int], result: StepResult) -> TokenDelta:
    sequence = chunk.sequence
    sequence.num_unknown_tokens -= 1
    first_row = chunk.first_row + chunk.num_prompt_rows
    if chunk.drafts:
        accepted, reason = _accept(chunk, token_ids[first_row : first_row + len(chunk.drafts) + 1])
    else:
        accepted = [token_ids[first_row]]
        reason = _take_token(sequence, accepted[0])
    return _delta(sequence, accepted, _logprobs(sequence, first_row, len(accepted), result), reason)


def _accept(chunk: Chunk, drawn: list[int]) -> tuple[list[int], FinishReason | None]:
    """Of what was drawn after each draft, and before any, as much as the drafts were right."""
    sequence = chunk.sequence
    accepted: list[int] = []
    reason: FinishReason | None = None
    for token_id, draft in zip(drawn, (*chunk.drafts, None), strict=True):
        accepted.append(token_id)
        reason = _take_token(sequence, token_id)
        if reason is not None or token_id != draft:
            break
    sequence.num_computed_tokens = len(sequence.token_ids) - 1  # the K/V of wrong drafts is void
    return accepted, reason


def _take_token(sequence: Sequence, token_id: int) -> FinishReason | None:
    """Whether it is the last."""
    sequence.token_ids.append(token_id)
    if token_id in sequence.stop_ids:
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_len else None


def _delta(
    sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprob], reason: FinishReason | None
) -> TokenDelta:
    is_first = not sequence.has_reported
    sequence.has_reported = True
    prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
    return TokenDelta(
        id=sequence.request.id,
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason=reason,
        is_stop_token=reason == "stop",
        num_cached_tokens=sequence.num_cached_tokens if is_first else None,
        prompt_logprobs=prompt_logprobs,
    )


def _take_pooled(chunk: Chunk, result: StepResult, pooling: Pooling) -> TokenDelta | None:
    """Of a preempted sequence, the chunk that starts anew replaces what there was."""
    sequence = chunk.sequence
    if chunk.num_pooled:
        part = result.pooled[chunk.first_row]
        before = sequence.pooled if chunk.start else None
        sequence.pooled = part if before is None else before + part
    if chunk.end < sequence.num_prompt_tokens:
        return None
    assert sequence.pooled is not None, "the last chunk is pooled"
    vector = sequence.pooled[: pooling.dimensions or None]
    if len(vector) < pooling.dimensions:
        message = f"'dimensions' is {pooling.dimensions}; this model's vectors have {len(vector)}"
        return end_with(sequence, RequestError("invalid_request", message))
    length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        return end_with(sequence, RequestError("internal", "the model gave states that are not finite"))
    return TokenDelta(
        id=sequence.request.id,
        finish_reason="stop",
        num_cached_tokens=sequence.num_cached_tokens,
        embedding=(vector / length).astype("<f4").tobytes(),  # of a sum and a mean the direction is the same
    )


def _first_error(chunk: Chunk, result: StepResult) -> RequestError | None:
    rows = range(chunk.first_row, chunk.first_row + chunk.num_rows)
    return next((result.errors[row] for row in rows if row in result.errors), None)


def _collect_prompt_logprobs(chunk: Chunk, result: StepResult) -> None:
    sequence = chunk.sequence
    assert sequence.num_scored is not None, "prompt rows without a request for them"
    rows = range(chunk.first_row, chunk.first_row + chunk.num_prompt_rows)
    sequence.prompt_logprobs.extend(result.logprobs[row] for row in rows)
    sequence.num_scored += chunk.num_prompt_rows


def _logprobs(sequence: Sequence, first_row: int, count: int, result: StepResult) -> list[TokenLogprob]:
    if sequence.request.sampling.logprobs is None:
        return []
    return [result.logprobs[row] for row in range(first_row, first_row + count)]
