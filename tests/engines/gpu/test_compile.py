"""That the kernels can be compiled for the GPUs they are written for, here where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 227 << 10
"""Bytes that a program may have on an H100 or H200."""


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.engines.gpu.compile_for_hopper"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    shared = json.loads(run.stdout)
    assert len(shared) == 14
    assert max(shared.values()) <= SHARED_MEMORY
    assert shared["decode_attention, bf16"] > 4 * (16 << 10), "while a tile is used, the next is on its way"
