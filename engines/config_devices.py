"""What this machine has, found without torch: GPUs and cores that this process may use."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Machine:
    """What groups can be placed on. GPUs count from 0 to num_gpus - 1; `visible` are the names that the
    parent's CUDA_VISIBLE_DEVICES gives them (None: the numbers are the names)."""

    num_gpus: int
    num_cores: int
    visible: tuple[str, ...] | None = None


def this_machine() -> Machine:
    """The machine, as far as this process may use it."""
    return Machine(num_gpus(), num_cores(), visible_devices(os.environ))


def num_gpus(environ: Mapping[str, str] | None = None) -> int:
    """GPUs that this process may use: those present, less what CUDA_VISIBLE_DEVICES hides."""
    present = num_gpus_present()
    visible = visible_devices(os.environ if environ is None else environ)
    return present if visible is None else min(present, len(visible))


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """What CUDA_VISIBLE_DEVICES names, as CUDA reads it: up to the first invalid entry. None: not set."""
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            break
        names.append(name)
    return tuple(names)


def num_gpus_present() -> int:
    """NVIDIA devices of the machine, by the driver's own list, or nvidia-smi's where that is hidden."""
    if _NVIDIA.is_dir():
        return len(list(_NVIDIA.iterdir()))
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
