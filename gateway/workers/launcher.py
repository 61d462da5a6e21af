"""How a worker group is started: its command line and its environment. Pure: starts nothing.

Command lines are lists; no text of a user goes through a shell. Ranks meet in files of the run
directory, so nothing of torchrun's listens on the network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.config import ModelConfig

_WORKER = "engines.worker"

# What the parent's environment must not decide: torchrun reads PET_* as its own flags, and the rest
# would tell a rank that it belongs to somebody else's group.
_FOREIGN_PREFIXES = ("PET_", "TORCHELASTIC_")
_FOREIGN = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLUICE_API_KEY",  # the gateway's secret; no worker needs it
    }
)


def guarded_argv(config: ModelConfig, run_dir: Path, log_dir: Path) -> list[str]:
    """The whole command of a group: the guard, around torchrun or the one process of `custom`.

    `run_dir` is the group's private directory, which the guard removes; `log_dir` gets the ranks' logs.
    """
    inner = torchrun_argv(config, run_dir, log_dir)
    return [sys.executable, "-m", "engines.guard", str(run_dir), "--", *inner]


def torchrun_argv(config: ModelConfig, run_dir: Path, log_dir: Path) -> list[str]:
    """The command that starts the ranks."""
    worker = ["-m", _WORKER, "--run-dir", str(run_dir)]
    if config.parallel_type == "custom":
        return [sys.executable, *worker]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(config.world_size)),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"),
        *("--rdzv-endpoint", str(run_dir / "rendezvous"), "--rdzv-id", run_dir.name),
        *("--local-addr", "127.0.0.1"),  # else torchrun asks the name server for our own name
        *("--max-restarts", "0", "--monitor-interval", f"{config.monitor_interval:g}"),
        *("--log-dir", str(log_dir), "--redirects", "3"),
    ]
    return [*torchrun, *worker]


def environment(config: ModelConfig, devices: Sequence[str], parent: Mapping[str, str]) -> dict[str, str]:
    """The environment of a group that holds `devices` (as CUDA_VISIBLE_DEVICES names them)."""
    kept = {
        name: value
        for name, value in parent.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {
        # A thread that waits for the others of a parallel region soon sleeps: by default it spins for
        # milliseconds, which takes cores that are shared (with the gateway, at least) from the others.
        "GOMP_SPINCOUNT": "1000",
        **kept,
        "OMP_NUM_THREADS": str(config.omp_threads),
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_SIZE": str(config.world_size),  # DeepSpeed's all-reduce on CPU crashes without it
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # seconds from SIGTERM to SIGKILL when a rank has died
        **(ranks if config.parallel_type == "custom" else {}),
    }
