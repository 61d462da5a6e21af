"""The DeepSpeed JSON file that `deepspeed.config` names: what decides the engine, and what cannot work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from engines.config_read import Settings

_KEY = "deepspeed.config"
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DeepSpeedFile:
    """What of the file bears on how a group is started."""

    kernel_inject: bool


def read_deepspeed_file(s: Settings, path: Path, world_size: int) -> DeepSpeedFile | None:
    """Read and check the file; what is wrong goes to `s`. None where it is missing (it may lie on the
    machine that will serve: placement looks again there) or wrong."""
    if not path.exists():
        return None
    content = _load(s, path)
    if content is None:
        return None
    inject = content.get("replace_with_kernel_inject", content.get("kernel_inject", False))
    if not isinstance(inject, bool):
        s.problem(
            _KEY,
            f"{path}: replace_with_kernel_inject is {inject!r}",
            allowed="true, false",
            remedy="correct it",
        )
    _check_size(s, path, content, world_size)
    if content.get("enable_cuda_graph") is True and world_size > 1:
        wrong = f"{path}: enable_cuda_graph does not work with {world_size} ranks"
        s.problem(_KEY, wrong, remedy="set it to false, or parallelLevel to 1")
    return DeepSpeedFile(kernel_inject=inject is True)


def _load(s: Settings, path: Path) -> dict[str, object] | None:
    remedy = "write a DeepSpeed inference configuration as one JSON object"
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_BYTES).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        s.problem(_KEY, f"{path}:{error.lineno}: not valid JSON: {error.msg}", remedy=remedy)
        return None
    except (OSError, ValueError, RecursionError) as error:
        s.problem(_KEY, f"{path}:1: cannot be read: {error}", remedy=remedy)
        return None
    if not isinstance(content, dict):
        s.problem(_KEY, f"{path}:1: is not a JSON object", remedy=remedy)
        return None
    return content


def _check_size(s: Settings, path: Path, content: dict[str, object], world_size: int) -> None:
    parallel = content.get("tensor_parallel", content.get("tp", {}))
    size = parallel.get("tp_size") if isinstance(parallel, dict) else parallel
    size = content.get("mp_size") if size is None else size
    if size is None or (type(size) is int and size == world_size):
        return
    wrong = f"{path}: tensor_parallel.tp_size is {size!r}, but the group has {world_size} ranks"
    s.problem(_KEY, wrong, remedy=f"set it to {world_size}, or parallelLevel or nproc-per-node to it")
