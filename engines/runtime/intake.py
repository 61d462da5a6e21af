"""From a Generate to a Sequence, or to the reason why it cannot be one. Common to all batching policies.

Whatever passes here cannot make the model, the sampler or the scheduler fail: every value is within
engines.bounds and every id within the vocabulary, whatever the gateway has checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engines import bounds
from engines.runtime.faults import failed
from engines.runtime.grammar import Constraint, Grammars
from engines.runtime.sequence import Sequence, root_hash
from engines.wire import FinishReason, Generate, RequestError, TokenDelta


class Intake:
    """`max_model_len` bounds prompt and generated tokens of one sequence, `vocab_size` the ids in it.
    Without `grammars` sequences that have one are refused."""

    def __init__(
        self,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        prefix_cache: bool,
        vocab_size: int,
        grammars: Grammars | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_token_ids)
        self._prefix_cache = prefix_cache
        self._grammars = grammars
        self._num_arrivals = 0

    def take(self, request: Generate) -> Sequence | TokenDelta:
        """A delta is its end: it was refused, or there is nothing to generate. Never raises."""
        try:
            return self._take(request)
        except Exception as error:  # in what it asks for: its own
            return TokenDelta(id=request.id, error=failed("taking it in", error))

    def _take(self, request: Generate) -> Sequence | TokenDelta:
        if (error := self._refusal(request)) is not None:
            return TokenDelta(id=request.id, error=error)
        sequence = self._new_sequence(request)
        reason = _ended_before(sequence)
        return sequence if reason is None else TokenDelta(id=request.id, finish_reason=reason)

    def _refusal(self, request: Generate) -> RequestError | None:
        if not request.prompt_ids:
            return RequestError("invalid_request", "the prompt is empty; it needs at least one token")
        if (message := next(out_of_bounds(request, self._vocab_size), None)) is not None:
            return RequestError("invalid_request", message)
        if request.pooling is not None and _asks_for_more(request):
            return RequestError("invalid_request", "a prompt that is pooled generates and scores nothing")
        if request.grammar and self._grammars is None:
            return RequestError("invalid_request", "this engine follows no grammar")
        num_tokens = len(request.prompt_ids) + len(request.resume_token_ids)
        will_generate = request.max_tokens > 0 and not request.resume_token_ids
        if num_tokens + will_generate <= self.max_model_len:
            return None
        message = (
            f"the prompt has {num_tokens} tokens; this model serves sequences of at most "
            f"{self.max_model_len} tokens, prompt and generated together: shorten the prompt"
        )
        return RequestError("too_long", message)

    def _new_sequence(self, request: Generate) -> Sequence:
        self._num_arrivals += 1
        ignores_eos = request.ignore_eos and not request.grammar  # which ends where its text is complete
        eos_ids = frozenset[int]() if ignores_eos else self._eos_ids
        scores_prompt = request.prompt_logprobs is not None and not request.resume_token_ids
        return Sequence(
            request=request,
            arrival=self._num_arrivals,
            token_ids=[*request.prompt_ids, *request.resume_token_ids],
            max_len=min(len(request.prompt_ids) + request.max_tokens, self.max_model_len),
            stop_ids=eos_ids.union(request.stop_token_ids),
            hash_root=self._hash_root(request),
            constraint=self._constraint(request),
            num_scored=1 if scores_prompt else None,
            prompt_logprobs=[None] if scores_prompt else [],
            has_reported=bool(request.resume_token_ids),
        )

    def _constraint(self, request: Generate) -> Constraint | None:
        return self._grammars.begin(request.grammar) if self._grammars and request.grammar else None

    def _hash_root(self, request: Generate) -> bytes | None:
        """Without a prefix cache only siblings share blocks."""
        if self._prefix_cache:
            return root_hash(request.cache_salt, "")
        return root_hash(request.cache_salt, request.group) if request.group else None


def out_of_bounds(request: Generate, vocab_size: int) -> Iterator[str]:
    """What in `request` no engine could serve, in sentences. The length is the model's to bound."""
    pooling = [(request.pooling, bounds.POOLING)] if request.pooling else []
    for part, ranges in ((request, bounds.GENERATE), (request.sampling, bounds.SAMPLING), *pooling):
        for name, allowed in ranges.items():
            value = getattr(part, name)
            if value is not None and not allowed.holds(value):
                yield f"'{name}' is {value}; {allowed.min} to {allowed.max} is allowed"
    bias = request.sampling.logit_bias
    for name, ids in (
        ("prompt_ids", request.prompt_ids),
        ("resume_token_ids", request.resume_token_ids),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", bias),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            yield f"'{name}' has the token id {wrong}; this model's are 0 to {vocab_size - 1}"
    if not all(map(bounds.LOGIT_BIAS.holds, bias.values())):
        low, high = bounds.LOGIT_BIAS
        yield f"'logit_bias' has a value that is not a number from {low} to {high}"
    for name, items, most in (
        ("logit_bias", bias, bounds.MAX_LOGIT_BIASES),
        ("stop_token_ids", request.stop_token_ids, bounds.MAX_STOP_TOKEN_IDS),
        ("id", request.id, bounds.MAX_LABEL_CHARS),
        ("group", request.group, bounds.MAX_LABEL_CHARS),
        ("cache_salt", request.cache_salt, bounds.MAX_LABEL_CHARS),
        ("grammar", request.grammar, bounds.MAX_GRAMMAR_CHARS),
    ):
        if len(items) > most:
            yield f"'{name}' has {len(items)} items; at most {most} are allowed"


def _asks_for_more(request: Generate) -> bool:
    """Than to be pooled."""
    scores_prompt = request.prompt_logprobs is not None
    return bool(request.max_tokens or request.resume_token_ids or request.grammar or scores_prompt)


def _ended_before(sequence: Sequence) -> FinishReason | None:
    """Why there is nothing left to generate: what was resumed had ended, or no token is wanted."""
    if sequence.request.resume_token_ids and sequence.token_ids[-1] in sequence.stop_ids:
        return "stop"
    wants_prompt = sequence.num_scored is not None or sequence.request.pooling is not None
    wants_nothing = len(sequence.token_ids) >= sequence.max_len and not wants_prompt
    return "length" if wants_nothing else None
