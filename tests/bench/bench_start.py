"""From `sluice serve` to ready, and what the processes hold then: `python -m tests.bench.bench_start`.

The demo model, medians of several starts, page cache warm. Memory is proportional (PSS: shared pages
divided by their users) but for the gateway's own, which is resident (RSS).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from gateway.bench import machine
from tests.bench.bench_peers import BIN, wait_ready
from tests.e2e.server import free_port


def start_once(model: list[str]) -> dict[str, float]:
    """One start and its end."""
    port = free_port()
    argv = [str(BIN / "sluice"), "serve", *model, "--port", str(port)]
    started = time.monotonic()
    child = subprocess.Popen(argv, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(f"http://127.0.0.1:{port}/readyz", child)
        seconds = time.monotonic() - started
        gateway = psutil.Process(child.pid)
        tree = [gateway, *gateway.children(recursive=True)]
        return {
            "ready_s": seconds,
            "gateway_rss_mb": gateway.memory_info().rss / 1e6,
            "tree_pss_mb": sum(process.memory_full_info().pss for process in tree) / 1e6,
        }
    finally:
        child.terminate()
        child.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="*", help="as for `sluice serve`")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start_once(args.model)  # fills the page cache
    starts = [start_once(args.model) for _ in range(args.starts)]
    record = {
        "command": "python -m tests.bench.bench_start",
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "sluice")},
        "starts": args.starts,
        "median": {key: round(median(start[key] for start in starts), 2) for key in starts[0]},
        "worst_ready_s": round(max(start["ready_s"] for start in starts), 2),
    }
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
