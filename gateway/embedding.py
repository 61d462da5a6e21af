"""The use case of embeddings: each input becomes a sequence whose prompt is pooled, and generates nothing.

A request may have more inputs than the groups and the queue in front of them have places: so many as a group
runs, and no more than MAX_TOGETHER, are in them at a time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import aclosing

from engines.wire import Generate, Pooling, PoolingMethod
from gateway.admission import Admission
from gateway.metrics import SequenceTimer
from gateway.prompts import require_ready
from gateway.protocol.common import InvalidField
from gateway.protocol.embeddings import name_of
from gateway.recovery import Recovery
from gateway.router import Router, ServedModel
from gateway.sequence_stream import ContextLengthExceeded, SequenceFailed, request_error
from gateway.sequences import require_known_ids
from gateway.tenant import Tenant

MAX_TOGETHER = 64


class NoEmbeddings(ValueError):  # noqa: N818
    """The model is not configured to serve them."""


def require_pooling(model: ServedModel, router: Router) -> PoolingMethod:
    """How the model's embeddings are made. Raises NoEmbeddings."""
    if model.pooling is not None:
        return model.pooling
    others = ", ".join(f"'{other.name}'" for other in router.models if other.pooling is not None)
    ask = f" Ask {others}, or" if others else " To have them,"
    raise NoEmbeddings(
        f"The model '{model.name}' serves no embeddings.{ask} set 'pooling: mean' or 'pooling: last', as the"
        " model was trained for, in its model-config.yaml (on the command line: --pooling)."
    )


class Embedding:
    """One request underway. Await `vectors()` once."""

    def __init__(
        self,
        admission: Admission,
        prompts: Sequence[list[int]],
        pooling: PoolingMethod,
        dimensions: int | None,
        tenant: Tenant,
    ) -> None:
        """Checks every limit; sends nothing yet.

        Raises InvalidField, ContextLengthExceeded, WorkerUnavailable, ModelFailed, QueueFull, RateLimited,
        LargerThanLimit.
        """
        self._admission, self._tenant = admission, tenant
        info = require_ready(admission.model)
        if dimensions is not None and dimensions > info.hidden_size:
            raise InvalidField(
                "dimensions",
                f"'dimensions' is {dimensions}; this model's vectors have {info.hidden_size}:"
                " ask for no more",
            )
        for place, prompt in enumerate(prompts):
            _check(prompt, name_of(place, len(prompts)), info.vocab_size, info.max_model_len)
        self.num_prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._num_together = min(len(prompts), info.max_num_seqs, MAX_TOGETHER)
        request = secrets.token_hex(12)
        self._sequences = [
            Generate(
                id=f"{request}-{place}",
                prompt_ids=prompt,
                max_tokens=0,
                cache_salt=tenant.cache_salt,
                pooling=Pooling(method=pooling, dimensions=dimensions or 0),
            )
            for place, prompt in enumerate(prompts)
        ]
        admission.require_room(tenant.name, self._num_together)
        tenant.take_prompt(self.num_prompt_tokens)

    async def vectors(self) -> list[bytes]:
        """Of each input, in order: float32, little-endian, of length 1.

        Raises QueueFull, QueueTimeout, SequenceRefused, SequenceFailed, WorkerUnavailable, WorkerLost,
        PoisonedRequest and TimeoutError. When one fails, the others are aborted.
        """
        self._admission.metrics.num_prompt_tokens += self.num_prompt_tokens
        vectors = [b""] * len(self._sequences)
        waiting = iter(enumerate(self._sequences))
        workers = [asyncio.create_task(self._work(waiting, vectors)) for _ in range(self._num_together)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return vectors

    async def _work(self, waiting: Iterator[tuple[int, Generate]], vectors: list[bytes]) -> None:
        """One after another, as long as there are more."""
        for place, sequence in waiting:
            async with self._admission.slot(self._tenant.name, len(sequence.prompt_ids)):
                vectors[place] = await self._pooled(sequence)

    async def _pooled(self, sequence: Generate) -> bytes:
        metrics = self._admission.metrics
        timer, reason = SequenceTimer(metrics), "abort"
        try:
            async with aclosing(Recovery(self._admission.model, sequence, metrics).deltas()) as batches:
                async for batch in batches:
                    for delta in batch:
                        if delta.error is not None:
                            raise request_error(delta.error)
                        if delta.embedding:
                            reason = "stop"
                            return delta.embedding
            raise SequenceFailed("the group ended the sequence without a vector")
        except Exception:
            reason = "error"
            raise
        finally:
            timer.on_end(reason)


def _check(prompt: list[int], name: str, vocab_size: int, max_model_len: int) -> None:
    if not prompt:
        raise InvalidField(name, f"'{name}' has no tokens: there is nothing to make a vector of")
    require_known_ids(name, prompt, vocab_size)
    if len(prompt) > max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, '{name}' has"
            f" {len(prompt)} tokens. Please reduce its length.",
            name,
        )
