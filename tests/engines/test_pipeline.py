"""The pipeline engine over real groups: uneven and tied models, refusals, deaths of any stage, clocks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.config import ModelConfig
from gateway.workers.protocol import WorkerLost
from tests.engines.harness import Group, StartFailed, running
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import GQA, ODD, make_llama

HANG_SECONDS = 3.0


def config_for(model: Path, **changes: object) -> ModelConfig:
    settings = {
        "model_name": "pipeline",
        "served_model_names": ("pipeline",),
        "model_path": str(model),
        "parallel_type": "pp",
        "engine": "pipeline",
        "pp_size": 2,
        "dtype": "float32",
        "kv_cache_memory": 4 << 20,
        "startup_timeout": 60,
        "max_retry_timeout": 0.0,
        **changes,
    }
    return ModelConfig.model_validate(settings)


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "gqa", GQA, seed=3)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with biases, one K/V head, an odd vocabulary."""
    return make_llama(tmp_path_factory.mktemp("models") / "odd", ODD, seed=4)


def tokens_equal(group: Group, model: Path, vocab: int) -> bool:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(6, vocab, seed=13)
    ended = group.run([request_of(f"t{i}", prompt) for i, prompt in enumerate(batch)])
    return [e.token_ids for e in ended] == [hf_greedy(reference, prompt) for prompt in batch]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_tied_embedding_is_on_the_first_stage_and_the_last(odd: Path, tp: int) -> None:
    with running(config_for(odd, tp_size=tp, parallel_type="pptp" if tp > 1 else "pp")) as group:
        assert tokens_equal(group, odd, ODD.vocab)


def test_the_clocks_of_all_stages_reach_the_gateway(gqa: Path) -> None:
    config = config_for(gqa, stage_split=(1, 2), pipeline_chunks=3)
    with running(config) as group:
        assert tokens_equal(group, gqa, GQA.vocab)
        stats = group.idle_stats()
    assert len(stats.stage_busy_seconds) == 2
    assert all(0 < seconds < stats.active_seconds for seconds in stats.stage_busy_seconds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp_size": 4}, "4 stages needs as many layers, and the model has 3: set pipelineParallel"),
        ({"stage_split": (1, 1)}, r"stageSplit \[1, 1\] adds to 2, and the model has 3 layers"),
        ({"tp_size": 3, "parallel_type": "pptp"}, "over 3 ranks each: its 8 attention heads"),
    ],
    ids=["stages", "split", "heads"],
)
def test_what_cannot_be_divided_is_refused_for_good_before_weights_are_read(
    gqa: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    unread = tmp_path / "config only"
    unread.mkdir()
    (unread / "config.json").write_bytes((gqa / "config.json").read_bytes())
    with pytest.raises(StartFailed, match=message) as failure:
        running(config_for(unread, **changes)).__enter__()
    assert failure.value.is_permanent


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("rank", [0, 1, 2], ids=["last", "middle", "first"])
def test_a_lost_stage_ends_the_group_and_its_streams(gqa: Path, blow: signal.Signals, rank: int) -> None:
    config = config_for(gqa, pp_size=3, response_timeout=HANG_SECONDS, kv_cache_memory=64 << 20)
    with running(config) as group:
        (prompt,) = prompts(1, GQA.vocab, seed=14)
        stream = group.start(request_of("long", prompt, 1900))
        group.abort_after(request_of("seen", prompt, 1900), num_tokens=5)
        pids = group.info.pids
        os.kill(pids[rank], blow)
        with pytest.raises((WorkerLost, TimeoutError)):
            stream.result(30)
        group.wait_until_failed()
        assert not any(psutil.pid_exists(pid) for pid in pids)
