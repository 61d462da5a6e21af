"""A DeepSpeed group as a TorchServe user configures it: it serves, listens nowhere, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from engines.config import load
from tests.engines.harness import running
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import MHA, make_llama

YAML = """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
parallelType: "tp"
deviceType: cpu
torchrun:
    nproc-per-node: 2
    OMP_NUMBER_THREADS: 1
deepspeed:
    config: ds-config.json
    checkpoint: checkpoints.json
handler:
    model_path: "."
    max_length: 50
"""


def listening(pids: list[int]) -> list[str]:
    """Addresses off the loopback on which any of the processes, or what started them, listens."""
    processes = {
        p for pid in pids for p in (psutil.Process(pid), psutil.Process(pid).parent()) if p is not None
    }
    sockets = [c for process in processes for c in process.net_connections("inet")]
    found = [str(c.laddr) for c in sockets if c.status == psutil.CONN_LISTEN]
    return [address for address in found if "127.0.0.1" not in address and "'::1'" not in address]


def shared_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").glob("deepspeed_allreduce_buffer*")}


@pytest.mark.parametrize("content", [{}, {"kernel_inject": True}], ids=["autotp", "fallback"])
def test_the_section_drives_the_engine(tmp_path: Path, content: dict[str, object]) -> None:
    model = make_llama(tmp_path / "model", MHA, seed=3)
    settings = {"dtype": "torch.float32", "tensor_parallel": {"tp_size": 2}, **content}
    (model / "ds-config.json").write_text(json.dumps(settings))
    fallback = "    fallback: autotp\n" if content else ""
    text = YAML.replace("handler:", f"{fallback}handler:") + "kvCacheMemory: 4MiB\nmodelName: m\n"
    (model / "model-config.yaml").write_text(text)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    before = shared_memory()
    with running(load(model / "model-config.yaml")) as group:
        assert group.info.engine == "deepspeed_tp"
        assert group.info.dtype == "float32"
        assert listening(group.info.pids) == []
        assert shared_memory() <= before, "names go as soon as every rank has mapped them"
        batch = prompts(8, MHA.vocab, seed=4)
        ended = group.run([request_of(f"r{i}", prompt) for i, prompt in enumerate(batch)])
        assert [one.token_ids for one in ended] == [hf_greedy(reference, prompt) for prompt in batch]
    assert shared_memory() <= before
