"""One sequence over the deaths of its groups: what was delivered stands, and another group goes on with it.

When a group dies, each of its sequences is sent again with the tokens that were delivered of it: at once to
another replica that is ready, else to the first group that is ready again. A draw depends on seed, choice and
position only, so what follows is what would have come.

A sequence that was in two groups when they died is taken for the cause, and refused. Every one that had been
sent counts, also if it still waited there: from outside nobody can tell which of them it was, and a second
guess would cost the others a third death.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

import msgspec

from engines.wire import Generate, TokenDelta
from gateway.metrics import ModelMetrics
from gateway.router import ModelChanged, ModelFailed, ServedModel, ShuttingDown, pick
from gateway.workers.protocol import Take, WorkerGroup, WorkerLost, WorkerUnavailable

MAX_DEATHS = 2
_LOOK_SECONDS = 0.05  # between two looks for a ready group
_REASONS = {
    ModelChanged: "changed",
    ModelFailed: "failed",
    ShuttingDown: "stopping",
}  # as the metric has them


class PoisonedRequest(Exception):  # noqa: N818
    """Two groups died with the sequence in them: it is not tried again."""


class Recovery:
    """One sequence. While it is in no group, it waits `model.recovery_wait` seconds at most for one.

    It goes on only where the fingerprint (weights, type, engine, layout) is the same: others may differ.
    """

    def __init__(
        self, model: ServedModel, request: Generate, metrics: ModelMetrics, cache_key: str = ""
    ) -> None:
        self._model, self._request, self._metrics = model, request, metrics
        self._cache_key = cache_key
        self._group: WorkerGroup | None = None  # that it was last sent to
        self._fingerprint: str | None = None
        self._delivered: list[int] = []
        self._num_prompt_logprobs = 0  # delivered
        self._num_repeated = 0  # of those, how many the group will send again
        self._num_deaths = 0
        self._take: Take | None = None

    async def deltas(self, take: Take | None = None) -> AsyncGenerator[list[TokenDelta], None]:
        """As WorkerGroup.generate gives them, `take` included. Iterate once; closing it aborts the sequence.

        Raises PoisonedRequest, TimeoutError (the group's), and when there is no group to go on in WorkerLost;
        to begin in, WorkerUnavailable or ModelFailed.
        """
        self._take = take
        lost: WorkerLost | None = None
        while True:
            group = await self._find_group(lost)
            if lost is not None:
                self._metrics.resumed["restarted" if group is self._group else "replica"] += 1
            try:
                async with aclosing(self._send(group)) as batches:
                    async for batch in batches:
                        yield [self._deliver(delta) for delta in batch]
                return
            except WorkerLost as error:
                self._count_death(error)
                lost = error

    async def _find_group(self, lost: WorkerLost | None) -> WorkerGroup:
        """At once if one is ready. Raises `lost` when there will be none; without a loss, or at the server's
        end, why so."""
        give_up_at = asyncio.get_running_loop().time() + self._model.recovery_wait
        why: Exception
        while True:
            try:
                return pick(self._model, {}, 1, self._fingerprint, self._cache_key)
            except (ModelChanged, ModelFailed, ShuttingDown) as error:
                why, reason = error, _REASONS[type(error)]
            except WorkerUnavailable as error:  # the groups start again, or have too many to take one more
                if asyncio.get_running_loop().time() < give_up_at:
                    await asyncio.sleep(_LOOK_SECONDS)
                    continue
                why, reason = error, "timeout"
            if lost is not None:
                self._metrics.recovery_failed[reason] += 1
            if lost is None or isinstance(why, ShuttingDown):  # which has ended the group, too
                raise why
            raise lost from why

    def _send(self, group: WorkerGroup) -> AsyncGenerator[list[TokenDelta], None]:
        assert group.info is not None, "a ready group has said what it is"
        self._group, self._fingerprint = group, group.info.fingerprint
        self._num_repeated = self._num_prompt_logprobs
        request = msgspec.structs.replace(self._request, resume_token_ids=[*self._delivered])
        # The protocol says that it can be closed; an AsyncIterator's type does not.
        take = None if self._take is None else self._deliver_at_once
        return cast("AsyncGenerator[list[TokenDelta], None]", group.generate(request, take))

    def _deliver_at_once(self, delta: TokenDelta) -> bool:
        if self._take is None or delta.prompt_logprobs or not self._take(delta):
            return False
        self._delivered += delta.token_ids
        return True

    def _deliver(self, delta: TokenDelta) -> TokenDelta:
        self._delivered += delta.token_ids
        return self._without_repeated(delta) if delta.prompt_logprobs else delta

    def _without_repeated(self, delta: TokenDelta) -> TokenDelta:
        """A group that died while it scored the prompt had sent a part of that; the next one begins anew."""
        new = delta.prompt_logprobs[self._num_repeated :]
        self._num_repeated = max(0, self._num_repeated - len(delta.prompt_logprobs))
        self._num_prompt_logprobs += len(new)
        return msgspec.structs.replace(delta, prompt_logprobs=new)

    def _count_death(self, error: WorkerLost) -> None:
        self._num_deaths += 1
        if self._num_deaths == MAX_DEATHS:
            self._metrics.num_poisoned += 1
            raise PoisonedRequest(f"{MAX_DEATHS} groups died with it, the last one so: {error}") from error
