"""The command line and environment of a group; with a real torchrun, that all listens on loopback only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from engines.config import ModelConfig
from gateway.workers import launcher

RUN, LOGS = Path("/run/group-1"), Path("/logs/1")

# Stands where engines.worker does: joins its group as ranks do, says so, and waits to be killed.
RANK = """\
import os, sys, time
import torch, torch.distributed as dist
run_dir = sys.argv[sys.argv.index("--run-dir") + 1]
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{run_dir}/group-init", rank=rank, world_size=size)
total = torch.ones(1)
dist.all_reduce(total)
print(f"rank {rank} sums {total.item():g}", flush=True)
print(f"rank {rank} complains", file=sys.stderr, flush=True)
time.sleep(60)
"""


def config(**fields: object) -> ModelConfig:
    given = {"model_name": "m", "served_model_names": ("m",), "model_path": "/m", "omp_threads": 3}
    return ModelConfig.model_validate({**given, **fields})


def test_torchrun_command() -> None:
    argv = launcher.torchrun_argv(config(tp_size=2, pp_size=2, parallel_type="pptp"), RUN, LOGS)
    assert argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert argv[-4:] == ["-m", "engines.worker", "--run-dir", "/run/group-1"]
    options = dict(zip(argv[3:-4:2], argv[4:-4:2], strict=True))
    assert options == {
        "--nnodes": "1",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-conf": "store_type=file",
        "--rdzv-endpoint": "/run/group-1/rendezvous",
        "--rdzv-id": "group-1",
        "--local-addr": "127.0.0.1",
        "--max-restarts": "0",
        "--monitor-interval": "0.1",
        "--log-dir": "/logs/1",
        "--redirects": "3",
    }


def test_custom_is_one_process_without_torchrun() -> None:
    one = config(parallel_type="custom", custom_devices=4)
    assert launcher.torchrun_argv(one, RUN, LOGS) == [
        *(sys.executable, "-m", "engines.worker", "--run-dir", "/run/group-1")
    ]
    env = launcher.environment(one, ("0", "1", "2", "3"), {})
    assert (env["RANK"], env["WORLD_SIZE"], env["CUDA_VISIBLE_DEVICES"]) == ("0", "1", "0,1,2,3")


def test_the_guard_stands_before_the_command() -> None:
    argv = launcher.guarded_argv(config(), RUN, LOGS)
    assert argv[:5] == [sys.executable, "-m", "engines.guard", "/run/group-1", "--"]
    assert argv[5:] == launcher.torchrun_argv(config(), RUN, LOGS)


def test_environment() -> None:
    env = launcher.environment(config(tp_size=2, device="cuda"), ("4", "5"), {"PATH": "/bin"})
    assert env == {
        "GOMP_SPINCOUNT": "1000",
        "PATH": "/bin",
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_SIZE": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }


def test_the_parents_environment_decides_nothing_about_the_group() -> None:
    parent = {
        "PET_NNODES": "2",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "OMP_NUM_THREADS": "64",
        "CUDA_VISIBLE_DEVICES": "0",
        "SLUICE_API_KEY": "secret",
    }
    env = launcher.environment(config(), (), parent)
    assert not {"PET_NNODES", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(env)
    assert (env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"]) == ("3", "")
    assert "secret" not in env.values()


@contextmanager
def torchrun(tmp_path: Path, size: int) -> Iterator[tuple[psutil.Process, Path, Path]]:
    """A real group of RANKs under our command line. All of it is killed at the end."""
    run_dir, log_dir, script = tmp_path / "group-1", tmp_path / "logs", tmp_path / "rank.py"
    run_dir.mkdir()
    script.write_text(RANK)
    argv = launcher.torchrun_argv(config(tp_size=size, omp_threads=1), run_dir, log_dir)
    where = argv.index("engines.worker")
    argv[where - 1 : where + 1] = [str(script)]
    env = launcher.environment(config(tp_size=size, omp_threads=1), (), os.environ)
    with (tmp_path / "launcher.log").open("w") as output:
        popen = subprocess.Popen(argv, env=env, stdout=output, stderr=output, start_new_session=True)
    process = psutil.Process(popen.pid)
    try:
        yield process, run_dir, log_dir
    finally:
        for each in [*process.children(recursive=True), process]:
            each.kill()
        popen.wait(10)


def until_joined(run_dir: Path, log_dir: Path, size: int) -> dict[str, str]:
    """What each rank wrote, as "RANK/FILE", once all have joined."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        logs = log_dir.glob(f"{run_dir.name}_*/attempt_0/*/std*.log")
        texts = {f"{path.parent.name}/{path.name}": path.read_text() for path in sorted(logs)}
        if len(texts) == 2 * size and all(text.endswith("\n") for text in texts.values()):
            return texts
        time.sleep(0.1)
    raise AssertionError("the ranks did not join in time")


@pytest.mark.slow
def test_a_real_torchrun_logs_by_rank_and_listens_on_loopback_only(tmp_path: Path) -> None:
    with torchrun(tmp_path, size=2) as (process, run_dir, log_dir):
        texts = until_joined(run_dir, log_dir, size=2)
        assert list(texts) == ["0/stderr.log", "0/stdout.log", "1/stderr.log", "1/stdout.log"]
        assert [texts[f"{rank}/stdout.log"] for rank in (0, 1)] == ["rank 0 sums 2\n", "rank 1 sums 2\n"]
        assert "rank 1 complains" in texts["1/stderr.log"]
        tree = [process, *process.children(recursive=True)]
        sockets = [socket for each in tree for socket in each.net_connections("inet")]
        assert len(tree) == 3
        assert {socket.laddr.ip for socket in sockets} == {"127.0.0.1"}  # gloo's pairs
