"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gateway.choice import ChoiceDelta


async def merge(
    sources: Sequence[AsyncGenerator[list[ChoiceDelta], None]],
) -> AsyncGenerator[list[ChoiceDelta], None]:
    """All of the sources' deltas, those that are ready together in one list.

    The first failure of a source is raised; leaving early, for whatever reason, closes all sources.
    """
    queue: asyncio.Queue[list[ChoiceDelta] | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_drain(source, queue)) for source in sources]
    try:
        num_open = len(tasks)
        while num_open:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            num_open -= items.count(None)
            if batch := [delta for item in items if isinstance(item, list) for delta in item]:
                yield batch
            for item in items:
                if isinstance(item, Exception):
                    raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(
    source: AsyncGenerator[list[ChoiceDelta], None],
    queue: asyncio.Queue[list[ChoiceDelta] | Exception | None],
) -> None:
    """One source into the queue, then None, or the exception that ended it."""
    try:
        async with aclosing(source):
            async for batch in source:
                queue.put_nowait(batch)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
