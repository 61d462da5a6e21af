"""Real groups that fail: a rank of each engine killed or stopped at each phase (a sample, of which
tests/soak/engine_faults.py has all), and engines that cannot start."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gateway.workers.protocol import GroupState
from tests.engines.faults import LAYOUTS, SHAPE, SHORT, Fault, config_for, strike, supervised, until
from tests.engines.layouts import Layout
from tests.engines.reference import hf_greedy
from tests.models import make_llama

pytestmark = pytest.mark.anyio
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
NATIVE, PP, PPTP, AUTOTP, ACCELERATE = LAYOUTS

SAMPLE = [
    (NATIVE, [Fault(1, STOP, "load"), Fault(0, STOP, "prefill")]),
    (PP, [Fault(1, STOP, "idle")]),
    (PPTP, [Fault(3, KILL, "decode")]),
    (AUTOTP, [Fault(1, STOP, "decode")]),
    (ACCELERATE, [Fault(0, KILL, "prefill")]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("faults") / "model", SHAPE, seed=3)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return hf_greedy(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), SHORT, 8)


@pytest.mark.parametrize(("layout", "faults"), SAMPLE, ids=[str(layout) for layout, _ in SAMPLE])
async def test_a_lost_rank_ends_its_group_which_serves_again(
    layout: Layout, faults: list[Fault], model: Path, expected: list[int]
) -> None:
    async with supervised(config_for(layout, model)) as (group, temp_dir):
        for fault in faults:
            outcome = await strike(group, temp_dir, fault, expected)
            if fault.blow == STOP:
                assert "hangs: one of its processes has been stopped" in outcome.reason
            else:
                assert "ended by SIGKILL" in outcome.reason
    assert group.num_restarts == len(faults)


CANNOT_START = {
    "accelerate is missing": (
        "accelerate",
        "accelerate",
        "needs the package accelerate: in Sluice's directory, pip install -e '.[accelerate]'",
    ),
    "deepspeed is missing": (
        "deepspeed_tp",
        "deepspeed",
        "need the package deepspeed: in Sluice's directory",
    ),
    "deepspeed is broken": (
        "deepspeed_tp",
        "hjson",
        "deepspeed is there but cannot be imported (import of hjson",
    ),
}


@pytest.mark.parametrize("case", CANNOT_START)
async def test_what_cannot_start_says_why_and_is_not_tried_again(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, package, words = CANNOT_START[case]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = config_for(ACCELERATE, model).model_copy(update={"engine": engine})  # one process, no torchrun
    async with supervised(config) as (group, _):
        await until(lambda: group.failure, "the group to fail")
        await until(lambda: group.state is GroupState.FAILED, "it to be given up")
        assert words in (group.failure or "")
        assert "\n" not in (group.failure or "")
        assert group.num_restarts == 0
