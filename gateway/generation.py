"""The use case: a request becomes sequences, their tokens become text, usage and finish reasons.

A request of p prompts and n choices is p * n sequences; choice c of prompt i has index i * n + c. With
best_of more are drawn, of which each prompt's n likeliest are shown. Each sequence waits for its turn
(admission.py) and is then sent to a group. Closing `Generation.events()` closes every sequence's iterator,
which takes it out of the queue or aborts it in its group.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from gateway.admission import Admission
from gateway.choice import ChoiceAssembler, ChoiceDelta, CollectedChoice
from gateway.direct import Direct
from gateway.merge import merge
from gateway.prompt.detokenize import Decoder
from gateway.prompts import require_ready
from gateway.protocol.common import (
    GenerationParams,
    PromptTokensDetails,
    Usage,
)
from gateway.scoring import PromptScoring
from gateway.sequence_stream import SequenceStream
from gateway.sequences import sequences_of
from gateway.tenant import Tenant

NUM_CONTEXT_IDS = 6
"""Prompt ids that a completion's first token is decoded behind: enough for any character."""


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
        scorings: Sequence[PromptScoring] = (),
        goes_on: bool = False,
        decoder: Decoder | None = None,
    ) -> None:
        """Checks every limit; sends nothing yet.

        `prompt_param` is the field that the prompts come from. The text goes on where a raw `prompt` ends,
        so its first word keeps its space; an answer to `messages` starts afresh, unless it `goes_on` with the
        last of them. `scorings`: one for each prompt, if the choices shall begin with a report on it.
        `decoder`: in place of the tokenizer.
        Raises InvalidField, ContextLengthExceeded, WorkerUnavailable, ModelFailed, QueueFull, RateLimited,
        LargerThanLimit.
        """
        self._admission, self._params, self._tenant = admission, params, tenant
        self._metrics = admission.metrics
        self._sequences: list[SequenceStream] = []
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        model = admission.model
        info = require_ready(model)
        self.fingerprint = info.fingerprint
        seed = secrets.randbits(63) if params.seed is None else params.seed % 2**63
        for number, prompt in enumerate(prompts):
            wires = sequences_of(prompt, prompt_param, params, info, seed, tenant.cache_salt)
            context = prompt[-NUM_CONTEXT_IDS:] if prompt_param == "prompt" or goes_on else []
            scoring = scorings[number] if scorings else None
            text_offset = scoring.num_chars if scoring else 0
            for choice, wire in enumerate(wires):
                index = number * params.num_drawn + choice
                assembler = ChoiceAssembler(index, model.tokenizer, params, context, text_offset, decoder)
                stream = SequenceStream(model, wire, assembler, scoring, cache_key=params.cache_key)
                self._sequences.append(stream)
        admission.require_room(tenant.name, len(self._sequences))
        tenant.take_prompt(self._prompt_tokens)

    @property
    def num_choices(self) -> int:
        return len(self._sequences)

    def usage(self) -> Usage:
        """So far, of all that was drawn. A prompt is counted once, whatever n is."""
        completion_tokens = sum(sequence.num_tokens for sequence in self._sequences)
        cached = sum(sequence.num_cached_tokens for sequence in self._sequences[:: self._params.num_drawn])
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached),
        )

    def likeliest(self, drawn: list[CollectedChoice]) -> list[CollectedChoice]:
        """Each prompt's n choices with the highest mean log-probability, best first: all, if n were drawn."""
        num_shown, num_drawn = self._params.n, self._params.num_drawn
        if num_shown == num_drawn:
            return drawn
        shown = []
        for first in range(0, len(drawn), num_drawn):
            indices = range(first, first + num_drawn)
            ranked = sorted(indices, key=lambda index: self._sequences[index].mean_logprob, reverse=True)
            shown += [drawn[index] for index in ranked[:num_shown]]
        return shown

    def events(self, direct: Direct | None = None) -> AsyncGenerator[list[ChoiceDelta], None]:
        """What is new, as soon as there is something; several at once when they are ready together. Of an
        only choice `direct` shows what it can at once, and that does not come from here.

        Raises QueueFull, QueueTimeout, SequenceRefused, SequenceFailed, ContextLengthExceeded,
        WorkerUnavailable, WorkerLost and TimeoutError. When one choice fails, the others are aborted.
        """
        self._metrics.num_prompt_tokens += self._prompt_tokens
        if len(self._sequences) == 1:
            return self._deltas(self._sequences[0], direct)
        return merge([self._deltas(sequence) for sequence in self._sequences])

    async def _deltas(
        self, sequence: SequenceStream, direct: Direct | None = None
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        """One sequence: its wait, its group, its text; and its tokens on its key's account."""
        wire, key = sequence.wire, self._tenant.name
        num_prompt = len(wire.prompt_ids) if wire.choice == 0 else 0  # the others share it
        async with self._admission.slot(key, num_prompt):
            try:
                async with aclosing(sequence.deltas(self._metrics, direct)) as batches:
                    async for batch in batches:
                        yield batch
            finally:
                self._admission.charge(key, sequence.num_tokens)
                self._tenant.count_answer(sequence.num_tokens)


async def collect(generation: Generation) -> list[CollectedChoice]:
    """The whole answer, choice by choice, of what was drawn the likeliest. Raises what `events` raises."""
    choices = [CollectedChoice() for _ in range(generation.num_choices)]
    async with aclosing(generation.events()) as events:
        async for batch in events:
            for delta in batch:
                choices[delta.index].add(delta)
    return generation.likeliest(choices)
