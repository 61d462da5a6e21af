"""The project's tests of what runs on GPUs, by pytest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.bench.gpu.bench import Bench

ROOT = Path(__file__).parents[3]
_RESULT = re.compile(r"^\S+\.py::.* (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)
_FAILURE = re.compile(r"^(?:FAILED|ERROR) .*", re.MULTILINE)
_LOG_CHARS, _MAX_LISTED, _TO_REPORT_SECONDS = 1500, 20, 5.0


def kernels(bench: Bench) -> None:
    """Our kernels, on whatever device there is, and what is made of them."""
    bench.part("tests/engines/gpu", lambda: _outcome(bench, "tests/engines/gpu"))


def groups(bench: Bench) -> None:
    """Whole worker groups, which need a GPU. They take turns, for one of them takes all of its memory."""
    bench.part("tests/engines/test_gpu.py", lambda: _outcome(bench, "-m", "gpu", "tests/engines/test_gpu.py"))


def _outcome(bench: Bench, *args: str) -> dict[str, Any]:
    """How many passed and failed, and which; also of a suite that has to be ended."""
    seconds = max(1.0, bench.seconds_left - _TO_REPORT_SECONDS)
    log = bench.options.work / f"{Path(args[-1]).stem}.log"
    # Warnings are errors in the project's own environment; a machine with a GPU may have other versions.
    argv = [sys.executable, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", *args]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        suite = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            status = suite.wait(seconds)
        except subprocess.TimeoutExpired:
            suite.kill()
            suite.wait()
            return _counted(log) | {"error": f"not done after {seconds:.0f} s"}
    return _counted(log) | ({"error": f"pytest has ended with status {status}"} if status else {})


def _counted(log: Path) -> dict[str, Any]:
    text = log.read_text(errors="replace")
    counts = Counter(result.lower() for result in _RESULT.findall(text))
    outcome: dict[str, Any] = {"passed": 0, "failed": 0, **counts}
    if counts["failed"] or counts["error"]:
        outcome |= {"failures": [line[:300] for line in _FAILURE.findall(text)[:_MAX_LISTED]]}
    if not counts or counts["error"]:
        outcome |= {"log": text[-_LOG_CHARS:]}
    return outcome
