"""The command line and the figures of a soak."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gateway import bench


def main(name: str, description: str | None, trials: int, run: Callable[[int], dict[str, object]]) -> None:
    """Run it; its figures have a number `failed`, which decides the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = f"python -m tests.soak.{name} --trials {arguments.trials}"
    figures = {"command": command, "machine": bench.machine(), **run(arguments.trials)}
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(text + "\n")
    sys.exit(bool(figures["failed"]))
