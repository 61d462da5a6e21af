"""What the tests of groups share: a configuration, a supervisor of FakeWorkers, and waiting."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from engines.config import ModelConfig
from engines.wire import Generate, TokenDelta
from gateway.workers.group import Group
from gateway.workers.life import GroupSpec
from gateway.workers.protocol import GroupState
from gateway.workers.supervisor import Supervisor
from tests.fake_worker import Behaviour, fake_command

SECONDS = 20.0  # longer than anything here takes on a busy machine
_numbers = itertools.count()


def fake_config(
    *, response_timeout: float = 30.0, startup_timeout: float = SECONDS, job_queue_size: int = 100
) -> ModelConfig:
    return ModelConfig(
        model_name="fake",
        served_model_names=("fake",),
        model_path="/nonexistent",
        response_timeout=response_timeout,
        startup_timeout=startup_timeout,
        job_queue_size=job_queue_size,
    )


def fake_group(behaviour: Behaviour | None = None, config: ModelConfig | None = None) -> GroupSpec:
    """A group of FakeWorkers that always behave the same."""
    return changing_group(itertools.repeat(behaviour or Behaviour()), config)


def changing_group(behaviours: Iterator[Behaviour], config: ModelConfig | None = None) -> GroupSpec:
    """A group of FakeWorkers, each start of which takes the next behaviour."""
    return GroupSpec(
        "fake/0", config or fake_config(), lambda run_dir, _: fake_command(next(behaviours), run_dir)
    )


@asynccontextmanager
async def supervised(tmp_path: Path, *specs: GroupSpec, grace: float = 0.0) -> AsyncIterator[Supervisor]:
    """The groups under a supervisor that does not wait between restarts."""
    temp_dir = tmp_path / "t"
    temp_dir.mkdir(exist_ok=True)
    supervisor = Supervisor(
        specs, tmp_path / "logs", temp_dir=temp_dir, grace_seconds=grace, backoff_seconds=lambda _: 0.0
    )
    async with supervisor:
        yield supervisor
    assert list(temp_dir.iterdir()) == []


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


async def until_ready(group: Group) -> None:
    await until(lambda: group.state is GroupState.READY)


def request(max_tokens: int = 5, prompt_ids: tuple[int, ...] = (1, 2, 3)) -> Generate:
    return Generate(id=f"r{next(_numbers)}", prompt_ids=list(prompt_ids), max_tokens=max_tokens)


async def read(stream: AsyncIterator[list[TokenDelta]], into: list[int] | None = None) -> list[int]:
    """All tokens; into a list of the caller's, what came before an error is there."""
    tokens = into if into is not None else []
    async for batch in stream:
        for delta in batch:
            tokens += delta.token_ids
    return tokens
