"""The use case: a request becomes sequences, their tokens become text, usage and finish reasons.

A request of p prompts and n choices is p * n sequences; choice c of prompt i has index i * n + c.
Closing `Generation.events()` closes every sequence's iterator, which aborts it in its group.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, cast

from engines.wire import Generate, Ready, RequestError, SamplingParams, TokenDelta, TokenLogprob
from gateway.metrics import ModelMetrics, SequenceTimer
from gateway.prompt.detokenize import Detokenizer, StopStrings
from gateway.prompt.tokenizer import LARGE_TEXT_CHARS, Tokenizer
from gateway.protocol.common import (
    GenerationParams,
    InvalidField,
    PromptTokensDetails,
    TokenInfo,
    Usage,
)
from gateway.router import ServedModel, pick, ready_groups
from gateway.workers.protocol import WorkerGroup

NUM_CONTEXT_IDS = 6
"""Prompt ids that a completion's first token is decoded behind: enough for any character."""


class NoChatTemplate(ValueError):  # noqa: N818
    """Chat was asked of a model that has no chat template."""


class ContextLengthExceeded(ValueError):  # noqa: N818
    """Prompt and answer together are longer than the model's context."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class SequenceRefused(ValueError):  # noqa: N818
    """The group refused one sequence, for a reason that is in the request."""


class SequenceFailed(Exception):  # noqa: N818
    """One sequence failed in the group while the group went on."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice. The last one has a finish reason."""

    index: int
    text: str
    logprobs: list[TokenInfo] | None  # None when not asked for
    finish_reason: str | None = None


async def chat_prompt(model: ServedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation. Raises NoChatTemplate, TemplateRefused, ControlTokenInText."""
    if model.template is None:
        raise NoChatTemplate(
            f"The model '{model.name}' has no chat template: use /v1/completions,"
            " or start the server with one."
        )
    if sum(len(text) for message in messages for text in message.values()) < LARGE_TEXT_CHARS:
        return _encode_chat(model, messages)
    return await asyncio.to_thread(_encode_chat, model, messages)


def _encode_chat(model: ServedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    assert model.template is not None
    tokenizer = model.tokenizer
    guard = tokenizer.guard()
    protected = [
        {key: tokenizer.protect(guard, value) for key, value in message.items()} for message in messages
    ]
    return tokenizer.encode_pieces(guard.cut(model.template.render(protected)))


async def completion_prompts(
    model: ServedModel, prompts: Sequence[str] | Sequence[list[int]]
) -> list[list[int]]:
    """The ids of raw prompts. Here control tokens are the caller's to write, in text as in ids."""
    return [
        await model.tokenizer.encode_async(prompt, add_special_tokens=True)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]


class Generation:
    """One request underway. Iterate `events()` once."""

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[list[int]],
        params: GenerationParams,
        metrics: ModelMetrics,
        *,
        prompt_param: Literal["messages", "prompt"],
    ) -> None:
        """Checks every limit and chooses the groups; sends nothing yet.

        `prompt_param` is the field that the prompts come from. The text goes on where a raw `prompt` ends,
        so its first word keeps its space; an answer to `messages` starts afresh.
        Raises InvalidField, ContextLengthExceeded, WorkerUnavailable, ModelFailed, QueueFull.
        """
        self._params = params
        self._metrics = metrics
        self._sequences: list[_Sequence] = []
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.fingerprint: str | None = None
        planned: Counter[str] = Counter()
        seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
        for number, prompt in enumerate(prompts):
            group = pick(model, planned, params.n)
            planned[group.name] += params.n
            info = group.info
            assert info is not None, "a ready group has said what it is"
            self.fingerprint = info.fingerprint
            wires = _wire_requests(prompt, prompt_param, params, info, seed)
            context = prompt[-NUM_CONTEXT_IDS:] if prompt_param == "prompt" else []
            for choice, wire in enumerate(wires):
                index = number * params.n + choice
                assembler = _ChoiceAssembler(index, model.tokenizer, params, context)
                self._sequences.append(_Sequence(group, wire, assembler))

    @property
    def num_choices(self) -> int:
        return len(self._sequences)

    def usage(self) -> Usage:
        """So far. A prompt is counted once, whatever n is."""
        completion_tokens = sum(sequence.num_tokens for sequence in self._sequences)
        cached = sum(sequence.num_cached_tokens for sequence in self._sequences[:: self._params.n])
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    async def events(self) -> AsyncGenerator[list[ChoiceDelta], None]:
        """What is new, as soon as there is something; several at once when they are ready together.

        Raises SequenceRefused, SequenceFailed, ContextLengthExceeded, WorkerUnavailable, WorkerLost and
        TimeoutError. When one choice fails, the others are aborted.
        """
        self._metrics.num_prompt_tokens += self._prompt_tokens
        if len(self._sequences) == 1:
            async with aclosing(self._sequences[0].deltas(self._metrics)) as deltas:
                async for delta in deltas:
                    yield [delta]
        else:
            async with aclosing(_merge([s.deltas(self._metrics) for s in self._sequences])) as batches:
                async for batch in batches:
                    yield batch


def require_ready(model: ServedModel) -> None:
    """Fails fast, before a prompt is tokenised. Raises WorkerUnavailable, ModelFailed."""
    ready_groups(model)


def _wire_requests(
    prompt: list[int], prompt_param: str, params: GenerationParams, info: Ready, seed: int
) -> list[Generate]:
    """The n sequences of one prompt."""
    if not prompt:
        raise InvalidField(prompt_param, "The prompt is empty: it has no tokens.")
    _check_ids(prompt, params, info.vocab_size)
    max_tokens = _max_tokens(len(prompt), prompt_param, params, info.max_model_len)
    sampling = SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        seed=seed,
        logprobs=params.logprobs,
    )
    group = secrets.token_hex(12)
    return [
        Generate(
            id=f"{group}-{choice}",
            prompt_ids=prompt,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            sampling=sampling,
            choice=choice,
            group=group,
        )
        for choice in range(params.n)
    ]


def _check_ids(prompt: list[int], params: GenerationParams, vocab_size: int) -> None:
    for param, ids in (
        ("prompt", prompt),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and max(ids) >= vocab_size:
            raise InvalidField(
                param, f"'{param}' has the token id {max(ids)}; this model's end at {vocab_size - 1}."
            )


def _max_tokens(num_prompt: int, prompt_param: str, params: GenerationParams, max_model_len: int) -> int:
    """How many tokens may come. Raises ContextLengthExceeded, with the numbers."""
    room = max_model_len - num_prompt
    wanted = None if params.is_max_tokens_default else params.max_tokens
    if (wanted or 1) > room:
        completion = wanted or 1
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested"
            f" {num_prompt + completion} tokens ({num_prompt} in the prompt, {completion} in the completion)."
            " Please reduce the length of the prompt or of the completion.",
            prompt_param,
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)


class _Sequence:
    """One sequence in its group, and its text."""

    def __init__(self, group: WorkerGroup, wire: Generate, assembler: _ChoiceAssembler) -> None:
        self._group = group
        self._wire = wire
        self._assembler = assembler
        self.num_cached_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._assembler.num_tokens

    async def deltas(self, metrics: ModelMetrics) -> AsyncGenerator[ChoiceDelta, None]:
        """Ends after the delta with the finish reason, and aborts what is left of the sequence."""
        timer = SequenceTimer(metrics)
        reason = "abort"
        # The protocol says that it can be closed; an AsyncIterator's type does not.
        source = cast("AsyncGenerator[TokenDelta, None]", self._group.generate(self._wire))
        try:
            async with aclosing(source):
                async for delta in source:
                    if delta.error is not None:
                        raise _request_error(delta.error)
                    if delta.num_cached_tokens is not None:
                        self.num_cached_tokens = delta.num_cached_tokens
                    if delta.token_ids:
                        timer.on_tokens(len(delta.token_ids))
                    new = self._assembler.feed(delta)
                    if new.text or new.logprobs or new.finish_reason:
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


def _request_error(error: RequestError) -> Exception:
    kinds: dict[str, Callable[[str], Exception]] = {
        "invalid_request": SequenceRefused,
        "too_long": ContextLengthExceeded,
        "internal": SequenceFailed,
    }
    return kinds[error.code](error.message)


class _ChoiceAssembler:
    """Token deltas of one choice to text: characters made whole, stop strings looked for.

    A token's logprob is held back until all of its text has been shown, and left out when a stop
    string cut it off: logprobs spell tokens too.
    """

    def __init__(
        self, index: int, tokenizer: Tokenizer, params: GenerationParams, context: Sequence[int]
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.decode, context)
        self._stops = StopStrings(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._wants_logprobs = params.logprobs is not None
        self._num_top = params.logprobs or 0
        self._num_decoded = 0  # characters
        self._num_shown = 0
        self._held: list[tuple[int, TokenInfo]] = []  # (characters decoded with it, token)
        self.num_tokens = 0

    def feed(self, delta: TokenDelta) -> ChoiceDelta:
        """What can be shown now. After a finish reason nothing more may be fed."""
        visible = delta.token_ids[:-1] if delta.is_stop_token else delta.token_ids
        text, is_stopped = self._push(visible, delta.logprobs)
        if is_stopped:
            return ChoiceDelta(self._index, text, self._release(len(text)), "stop")
        self.num_tokens += len(delta.token_ids) - len(visible)
        if delta.finish_reason is None:
            return ChoiceDelta(self._index, text, self._release(len(text)))
        end, is_stopped = self._end()
        text += end
        return ChoiceDelta(
            self._index, text, self._release(len(text)), "stop" if is_stopped else delta.finish_reason
        )

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
            (self._tokenizer.token_bytes(other), value) for other, value in logprob.top[: self._num_top]
        )
        info = TokenInfo(self._tokenizer.token_bytes(id), logprob.logprob, top, self._num_decoded)
        self._held.append((self._num_decoded + num_chars, info))

    def _release(self, num_new: int) -> list[TokenInfo] | None:
        if not self._wants_logprobs:
            return None
        self._num_shown += num_new
        count = sum(1 for end, _ in self._held if end <= self._num_shown)
        ready, self._held = self._held[:count], self._held[count:]
        return [info for _, info in ready]


async def _merge(
    sources: Sequence[AsyncGenerator[ChoiceDelta, None]],
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """All of the sources' deltas, those that are ready together in one list.

    The first failure of a source is raised; leaving early, for whatever reason, closes all sources.
    """
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_drain(source, queue)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            num_open -= items.count(None)
            if batch := [item for item in items if isinstance(item, ChoiceDelta)]:
                yield batch
            for item in items:
                if isinstance(item, Exception):
                    raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(
    source: AsyncGenerator[ChoiceDelta, None], queue: asyncio.Queue[ChoiceDelta | Exception | None]
) -> None:
    """One source into the queue, then None, or the exception that ended it."""
    try:
        async with aclosing(source):
            async for delta in source:
                queue.put_nowait(delta)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


async def collect(generation: Generation) -> list[CollectedChoice]:
    """The whole answer, choice by choice. Raises what `events` raises."""
    choices = [CollectedChoice() for _ in range(generation.num_choices)]
    async with aclosing(generation.events()) as events:
        async for batch in events:
            for delta in batch:
                choices[delta.index].add(delta)
    return choices


class CollectedChoice:
    """A choice put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.logprobs: list[TokenInfo] | None = None
        self.finish_reason = ""

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, delta: ChoiceDelta) -> None:
        self._texts.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
