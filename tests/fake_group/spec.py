"""What a fake group is and which faults it has; and how the supervisor starts it."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from engines.config import ModelConfig
    from gateway.workers.life import GroupSpec
    from gateway.workers.process import Command

REPO = Path(__file__).parents[2]
VARIABLE = "FAKE_GROUP"
Phase = Literal["load", "idle", "prefill", "decode", "sample"]
Action = Literal["kill", "exit", "raise", "memory", "stop", "hang"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happens at the `nth` round of `phase` (1 is the first): SIGKILL to itself, exit code 137, an
    exception, a MemoryError, SIGSTOP to itself, or the leader hangs while its I/O thread goes on.

    With a `token`, only rounds count that compute a sequence whose prompt has it: a poisonous request.
    """

    phase: Phase
    action: Action = "kill"
    nth: int = 1
    token: int | None = None


class FakeSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fake group. `num_ranks` above 1 adds processes that only sleep, but whose end is the group's.

    With the defaults it fits the demo model's tokenizer, so that its tokens are text.
    """

    num_ranks: int = 1
    load_seconds: float = 0.0
    step_seconds: float = 0.001
    max_num_seqs: int = 64
    num_blocks: int = 4096
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    vocab_size: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    prefix_cache: bool = True
    fingerprint: str = "fp_fake"
    faults: tuple[Fault, ...] = ()


def fake_command(spec: FakeSpec, run_dir: Path) -> Command:
    """The fake group under the real guard, as GroupSpec.command wants it."""
    from gateway.workers.process import Command  # not for the group itself: it shall start fast

    program = (sys.executable, "-m", "tests.fake_group.process", str(run_dir))
    argv = (sys.executable, "-m", "engines.guard", str(run_dir), "--", *program)
    environment = {
        VARIABLE: msgspec.json.encode(spec).decode(),
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
    }
    return Command(argv, {**os.environ, **environment})


def fake_group(
    spec: FakeSpec | Iterator[FakeSpec], config: ModelConfig | None = None, name: str = "fake/0"
) -> GroupSpec:
    """For the Supervisor. An iterator gives each start of the group its own spec."""
    from gateway.workers.life import GroupSpec

    specs = itertools.repeat(spec) if isinstance(spec, FakeSpec) else spec
    return GroupSpec(name, config or fake_config(), lambda run_dir, _: fake_command(next(specs), run_dir))


def fake_config(
    *, response_timeout: float = 30.0, startup_timeout: float = 60.0, job_queue_size: int = 1000
) -> ModelConfig:
    from engines.config import ModelConfig

    return ModelConfig(
        model_name="fake",
        served_model_names=("fake",),
        model_path="/nonexistent",
        response_timeout=response_timeout,
        startup_timeout=startup_timeout,
        job_queue_size=job_queue_size,
    )
