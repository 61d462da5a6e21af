"""What the engines' tests share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _deepspeeds_all_reduce() -> None:
    """Compiled ahead: it takes a minute on a busy machine, more than a group gets to start in these tests."""
    from engines.models.deepspeed_comm import ALL_REDUCE

    has_tools = find_spec("deepspeed") is not None and shutil.which("g++") and shutil.which("ninja")
    if has_tools and not ALL_REDUCE.is_compiled:
        subprocess.run([sys.executable, "-m", "engines.models.deepspeed_comm"], timeout=600, check=True)
