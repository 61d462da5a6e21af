"""Every rank of every layout killed and stopped, at load, prefill, decode and idle:

    python -m tests.soak.engine_faults [--layouts NAME ...] [--trials N] [--json FILE]

A trial is all of that once. tests/engines/faults.py says what is asserted of each fault. Ends with 1 where a
request waited for its error longer than it may.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gateway.bench import machine
from tests.engines import faults
from tests.engines.faults import LAYOUTS, SHAPE, Fault
from tests.engines.harness import compile_all_reduce
from tests.engines.layouts import Layout
from tests.models import make_llama

LIMITS = {signal.SIGKILL: 2.0, signal.SIGSTOP: 5.0}
"""Seconds until every request in the group has its error; without requests, until the group was noticed."""


async def strike_all(layout: Layout, wanted: list[Fault], model: Path) -> list[dict[str, Any]]:
    """The faults one after another at one group, which is started again after each."""
    found = []
    async with faults.supervised(faults.config_for(layout, model)) as (group, temp_dir):
        await faults.until_ready(group)
        expected = await faults.answer(group)
        for fault in wanted:
            outcome = await faults.strike(group, temp_dir, fault, expected)
            is_in_time = outcome.ended <= LIMITS[fault.blow]
            print(f"{layout} {fault}: {_words(outcome)}{'' if is_in_time else '  TOO LATE'}", flush=True)
            found.append(
                {"layout": str(layout), "fault": str(fault), "is_in_time": is_in_time, **asdict(outcome)}
            )
    return found


def _words(outcome: faults.Outcome) -> str:
    return f"ended {outcome.ended:.2f} s, gone {outcome.gone:.2f} s, serves {outcome.served:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=[str(layout) for layout in LAYOUTS])
    parser.add_argument("--phases", nargs="*", default=list(faults.PHASES), choices=faults.PHASES)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = make_llama(Path(directory) / "model", SHAPE, seed=3)
        for layout in (one for one in LAYOUTS if str(one) in args.layouts):
            wanted = [fault for fault in faults.faults_of(layout) if fault.phase in args.phases]
            if layout.engine == "deepspeed_tp":
                compile_all_reduce()
            found += asyncio.run(strike_all(layout, wanted * args.trials, model))
            write(args.json, found)
    late = [one for one in found if not one["is_in_time"]]
    print(f"{len(found)} faults: 0 without recovery, {len(late)} too late")
    sys.exit(bool(late))


def write(file: Path | None, found: list[dict[str, Any]]) -> None:
    """The figures so far: a soak that is broken off has not been for nothing."""
    if file is None:
        return
    command = "python -m tests.soak.engine_faults " + " ".join(sys.argv[1:])
    num_late = sum(not one["is_in_time"] for one in found)
    result = {"command": command, "machine": machine(), "num_faults": len(found), "num_late": num_late}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**result, "faults": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
