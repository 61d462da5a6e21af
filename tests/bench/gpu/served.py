"""The same over HTTP: `sluice serve` on this device and `sluice bench`'s client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median

from gateway.bench import make_prompts, run_level
from tests.bench.bench_peers import Server, process, wait_ready
from tests.bench.gpu.bench import Bench
from tests.bench.gpu.model import model_of
from tests.bench.gpu.offline import RATE
from tests.e2e.server import free_port

_ROUNDS, _LOG_CHARS = 2, 1500
_TO_REPORT_SECONDS = 5.0


def measure(bench: Bench) -> None:
    version("sluice")  # the gateway tells its own: raises where the package's metadata is not there
    model_of(bench.options)
    bench.part("server", lambda: _row(bench))


def _row(bench: Bench) -> dict[str, float]:
    with server(bench) as side:
        rates = [_rate(bench, side, seed) for seed in range(_ROUNDS + 1)]
    rate, offline = median(rates[1:]), bench.of("offline", RATE)
    return {RATE: round(rate, 1)} | ({} if offline is None else {"of_offline": round(rate / offline, 3)})


def _rate(bench: Bench, side: Server, seed: int) -> float:
    """All requests at once."""
    options = bench.options
    config = side.config(options.prompt_len, options.output_len, seed)
    result = asyncio.run(run_level(config, options.num_requests, make_prompts(config, options.num_requests)))
    if result.num_failed or result.num_output_tokens != options.num_output_tokens:
        raise RuntimeError(
            f"{result.num_output_tokens} tokens came, not {options.num_output_tokens}; {result.first_error}"
        )
    return result.output_tokens_per_s


@contextmanager
def server(bench: Bench) -> Iterator[Server]:
    """Ready. Its log and those of its ranks are under the options' `work`."""
    options, port, model = bench.options, free_port(), model_of(bench.options)
    log = options.work / "served.log"
    argv = [sys.executable, "-c", "from gateway.cli import main; main()", "serve", str(model)]
    argv += ["--device", options.device_type, "--dtype", "bfloat16", "--port", str(port)]
    argv += ["--served-name", "bench", "--max-num-seqs", str(options.num_requests)]
    argv += ["--log-dir", str(options.work / "served")]
    with process(argv, log, stdout=subprocess.DEVNULL) as child:
        try:
            wait_ready(f"http://127.0.0.1:{port}/readyz", child, bench.seconds_left - _TO_REPORT_SECONDS)
        except SystemExit as error:
            raise RuntimeError(f"{error}: {_tail(log)}") from None
        yield Server(child, f"http://127.0.0.1:{port}", "bench", model)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_CHARS:]
