"""The use case: a request becomes sequences, their tokens become text, usage and finish reasons.

A request of p prompts and n choices is p * n sequences; choice c of prompt i has index i * n + c. Each waits
for its turn (admission.py) and is then sent to a group. Closing `Generation.events()` closes every sequence's
iterator, which takes it out of the queue or aborts it in its group.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from engines.wire import Generate, Ready, SamplingParams
from gateway.admission import Admission
from gateway.choice import ChoiceAssembler, ChoiceDelta, CollectedChoice
from gateway.merge import merge
from gateway.prompt.tokenizer import LARGE_TEXT_CHARS
from gateway.protocol.common import (
    GenerationParams,
    InvalidField,
    PromptTokensDetails,
    Usage,
)
from gateway.router import ServedModel, ready_groups
from gateway.sequence_stream import ContextLengthExceeded, SequenceStream
from gateway.tenant import Tenant

NUM_CONTEXT_IDS = 6
"""Prompt ids that a completion's first token is decoded behind: enough for any character."""


class NoChatTemplate(ValueError):  # noqa: N818
    """Chat was asked of a model that has no chat template."""


async def chat_prompt(model: ServedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation. Raises NoChatTemplate, TemplateRefused, ControlTokenInText."""
    if model.template is None:
        raise NoChatTemplate(
            f"The model '{model.name}' has no chat template: use /v1/completions,"
            " or start the server with one."
        )
    is_large = sum(len(text) for message in messages for text in message.values()) >= LARGE_TEXT_CHARS
    tokenizer, guard = model.tokenizer, model.tokenizer.guard()

    def protect() -> list[dict[str, str]]:
        return [
            {key: tokenizer.protect(guard, value) for key, value in message.items()} for message in messages
        ]

    rendered = await model.template.render(await asyncio.to_thread(protect) if is_large else protect())
    pieces = guard.cut(rendered)
    if not is_large:
        return tokenizer.encode_pieces(pieces)
    return await asyncio.to_thread(tokenizer.encode_pieces, pieces)


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
        admission: Admission,
        prompts: Sequence[list[int]],
        params: GenerationParams,
        tenant: Tenant,
        *,
        prompt_param: Literal["messages", "prompt"],
    ) -> None:
        """Checks every limit; sends nothing yet.

        `prompt_param` is the field that the prompts come from. The text goes on where a raw `prompt` ends,
        so its first word keeps its space; an answer to `messages` starts afresh.
        Raises InvalidField, ContextLengthExceeded, WorkerUnavailable, ModelFailed, QueueFull, RateLimited,
        LargerThanLimit.
        """
        self._admission, self._params, self._tenant = admission, params, tenant
        self._metrics = admission.metrics
        self._sequences: list[SequenceStream] = []
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        model = admission.model
        info = ready_groups(model)[0].info
        assert info is not None, "a ready group has said what it is"
        self.fingerprint = info.fingerprint
        seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
        for number, prompt in enumerate(prompts):
            wires = _wire_requests(prompt, prompt_param, params, info, seed, tenant.cache_salt)
            context = prompt[-NUM_CONTEXT_IDS:] if prompt_param == "prompt" else []
            for choice, wire in enumerate(wires):
                index = number * params.n + choice
                assembler = ChoiceAssembler(index, model.tokenizer, params, context)
                self._sequences.append(SequenceStream(model, wire, assembler))
        admission.require_room(tenant.name, len(self._sequences))
        tenant.take_prompt(self._prompt_tokens)

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

        Raises QueueFull, QueueTimeout, SequenceRefused, SequenceFailed, ContextLengthExceeded,
        WorkerUnavailable, WorkerLost and TimeoutError. When one choice fails, the others are aborted.
        """
        self._metrics.num_prompt_tokens += self._prompt_tokens
        if len(self._sequences) == 1:
            async with aclosing(self._deltas(self._sequences[0])) as deltas:
                async for delta in deltas:
                    yield [delta]
        else:
            async with aclosing(merge([self._deltas(sequence) for sequence in self._sequences])) as batches:
                async for batch in batches:
                    yield batch

    async def _deltas(self, sequence: SequenceStream) -> AsyncGenerator[ChoiceDelta, None]:
        """One sequence: its wait, its group, its text; and its tokens on its key's account."""
        wire, key = sequence.wire, self._tenant.name
        num_prompt = len(wire.prompt_ids) if wire.choice == 0 else 0  # the others share it
        async with self._admission.slot(key, num_prompt):
            try:
                async with aclosing(sequence.deltas(self._metrics)) as deltas:
                    async for delta in deltas:
                        yield delta
            finally:
                self._admission.charge(key, sequence.num_tokens)
                self._tenant.count_answer(sequence.num_tokens)


def require_ready(model: ServedModel) -> None:
    """Fails fast, before a prompt is tokenised. Raises WorkerUnavailable, ModelFailed."""
    ready_groups(model)


def _wire_requests(
    prompt: list[int], prompt_param: str, params: GenerationParams, info: Ready, seed: int, cache_salt: bytes
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
            grammar=params.grammar or "",
            cache_salt=cache_salt,
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


async def collect(generation: Generation) -> list[CollectedChoice]:
    """The whole answer, choice by choice. Raises what `events` raises."""
    choices = [CollectedChoice() for _ in range(generation.num_choices)]
    async with aclosing(generation.events()) as events:
        async for batch in events:
            for delta in batch:
                choices[delta.index].add(delta)
    return choices
