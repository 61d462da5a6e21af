"""DeepSpeed on one rank: its import, its process group, and its all-reduce on CPU.

DeepSpeed's all-reduce for CPUs goes through shared memory: 66 MB a rank under /dev/shm, waits by spinning,
compiled when first used (`python -m engines.models.deepspeed_comm` does it ahead). Where it cannot be had, or
would hurt, gloo does the work; the log says which and why. Nothing of it outlives the group: its names have
that of the run directory, which the guard removes, and go as soon as every rank has its mapping.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from engines.base import ReportProgress, UnsupportedModel
from engines.runtime.mesh import Mesh

log = logging.getLogger("sluice.deepspeed")

SHARED_MEMORY = Path("/dev/shm")
WORKSPACE_BYTES = 68 << 20
"""What a rank's all-reduce takes of SHARED_MEMORY (struct allreduce_workspace of shm.cpp, rounded up)."""


@dataclass(frozen=True, slots=True)
class Extension:
    """C++ or CUDA that comes with DeepSpeed as source."""

    name: str
    builder: str
    words: str

    @property
    def is_compiled(self) -> bool:
        """Whether a start need not wait for it: what is older than the packages is compiled anew."""
        found = build_root() / self.name / f"{self.name}.so"
        packages = [find_spec(name) for name in ("torch", "deepspeed")]
        origins = [Path(package.origin) for package in packages if package and package.origin]
        return found.exists() and all(found.stat().st_mtime > path.stat().st_mtime for path in origins)


ALL_REDUCE = Extension("deepspeed_shm_comm", "ShareMemCommBuilder", "DeepSpeed's shared-memory all-reduce")
KERNELS = Extension("transformer_inference", "InferenceBuilder", "DeepSpeed's inference kernels")


def require_deepspeed() -> None:
    """Raises UnsupportedModel where the package is not installed. Imports nothing."""
    if find_spec("deepspeed") is None:
        raise UnsupportedModel(
            "engines deepspeed_tp and deepspeed_inject need the package deepspeed: "
            "in Sluice's directory, pip install -e '.[deepspeed]'"
        )


def connect(mesh: Mesh, report: ReportProgress) -> ModuleType:
    """Import DeepSpeed and have it use the process group that this rank is in. Returns the package.

    Call it on every rank, after `torch.distributed` was initialised. Raises UnsupportedModel.
    """
    require_deepspeed()
    os.environ["DS_ACCELERATOR"] = mesh.device.type
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UnsupportedModel(
            f"the package deepspeed is there but cannot be imported ({error}): "
            "in Sluice's directory, pip install -e '.[deepspeed]'"
        ) from error
    if mesh.world_size > 1:
        reason = _agreed(_prepare_shared_memory(deepspeed, mesh, report))
        deepspeed.ops.__compatible_ops__ = {ALL_REDUCE.name: not reason}
        with _names_of_the_group():
            deepspeed.init_distributed(dist_init_required=False, verbose=False)
        dist.barrier()  # from here on every rank has mapped the workspaces of all
        _unlink(mesh.rank)
        if reason and mesh.device.type == "cpu":
            log.warning("all-reduce: %s, which is slower: %s", dist.get_backend(), reason)
        else:
            log.info("all-reduce: %s", dist.get_backend() if reason else "shared memory")
    return deepspeed


def tensor_parallel(mesh: Mesh) -> dict[str, object]:
    """The section of that name for `init_inference`: our own group. In one that DeepSpeed makes by itself,
    ranks would wait for each other for half an hour."""
    if mesh.tp_group is None:
        return {"tp_size": mesh.tp_size}
    return {"tp_size": mesh.tp_size, "tp_group": mesh.tp_group, "mpu": _Units(mesh)}


class _Units:
    """The mesh, as DeepSpeed asks for it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size


def reason_for_the_backend(world_size: int, device: str, num_cores: int) -> str:
    """Why the group's own backend shall reduce, or "" where shared memory may."""
    if device != "cpu":
        return "shared memory is for CPUs"
    if world_size > num_cores:
        return f"{world_size} ranks would spin on {num_cores} cores"
    if shutil.disk_usage(SHARED_MEMORY).free < world_size * WORKSPACE_BYTES:
        return f"{SHARED_MEMORY} has less than {world_size} x {WORKSPACE_BYTES >> 20} MiB free"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found, which build the shared-memory one" if missing else ""


def _prepare_shared_memory(deepspeed: ModuleType, mesh: Mesh, report: ReportProgress) -> str:
    """Build and load the operator, unless there is a reason not to, which is returned."""
    reason = reason_for_the_backend(mesh.world_size, mesh.device.type, len(os.sched_getaffinity(0)))
    if reason:
        return reason
    os.environ["LOCAL_SIZE"] = str(mesh.world_size)  # without it the operator crashes
    try:
        build(deepspeed, ALL_REDUCE, report)
    except Exception as error:  # whatever compilers and loaders raise
        log.exception("DeepSpeed's shared-memory all-reduce could not be built")
        return f"the shared-memory one could not be built: {type(error).__name__}"
    return ""


def build(deepspeed: ModuleType, extension: Extension, report: ReportProgress) -> None:
    """Compile an extension, unless that was done, and load it. Raises whatever compilers and loaders do."""
    if not extension.is_compiled:
        log.info("compiling %s, once, into %s: a minute or more", extension.words, build_root())
        report(0.0, "compile")
    builder = deepspeed.accelerator.get_accelerator().create_op_builder(extension.builder)
    with _alone_in(build_root(), extension) as root:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
        builder.load(verbose=False)
    report(0.0)


def _agreed(reason: str) -> str:
    """All ranks reduce the same way: "" only where it is "" on all of them."""
    flag = torch.tensor(1 if reason else 0, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag)
    return reason or ("another rank cannot use shared memory" if int(flag) else "")


def build_root() -> Path:
    """Where what DeepSpeed builds is kept: the user's, a directory a Python environment. Two that shared
    it would each compile anew what the other had, because their header files lie elsewhere."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    return Path(cache) / "sluice" / f"torch_extensions-{environment}"


@contextmanager
def _alone_in(root: Path, extension: Extension) -> Iterator[Path]:
    """One process at a time. A lock that torch left there when it was killed would stop all later ones."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (root / "sluice.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for stale in root.glob(f"**/{extension.name}/lock"):
            stale.unlink()
        yield root


@contextmanager
def _names_of_the_group() -> Iterator[None]:
    """DeepSpeed names its shared memory after MASTER_ADDR and MASTER_PORT: let that be the run directory."""
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _group_name(), "0"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _group_name() -> str:
    """torchrun's run id, which the launcher makes the run directory's name."""
    return os.environ.get("TORCHELASTIC_RUN_ID", f"pid{os.getppid()}")


def _unlink(rank: int) -> None:
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{_group_name()}_0_{rank}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def main() -> None:
    """Compile the all-reduce ahead of the first start."""
    require_deepspeed()
    started, words = time.monotonic(), "is there"
    if not ALL_REDUCE.is_compiled:
        print(f"Compiling {ALL_REDUCE.words}; it takes a minute or more.", flush=True)
        words = "is compiled"
    os.environ["DS_ACCELERATOR"] = "cpu"
    build(importlib.import_module("deepspeed"), ALL_REDUCE, lambda *_: None)
    print(f"{ALL_REDUCE.words} {words}: {build_root()} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
