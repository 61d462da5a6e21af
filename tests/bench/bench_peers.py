"""Output tokens per second beside peers, in one run: `python -m tests.bench.bench_peers --models DIR`.

Every side stays up and is measured in turn, round after round, so that a machine whose speed drifts slows all
of them; the others are stopped meanwhile, for some are never idle. Reported: medians over the rounds, and the
median of the ratios round by round. Servers are driven over HTTP with SSE by `sluice bench`'s own client.

`transformers serve` and `generate` are of this environment. vLLM's CPU build and llama.cpp's server live in
ones of their own, which `tests/bench/vllm_cpu.sh DIR` and `llama_cpp.sh DIR` make; `--vllm DIR` and
`--llama-cpp DIR` then have them take part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Protocol

import psutil
import torch

from gateway.bench import BenchConfig, machine, make_prompts, run_level
from tests.e2e.server import free_port
from tests.models import SHAPES, Shape, make_llama

PROMPT_LEN, OUTPUT_LEN = 128, 64
BIN = Path(sys.executable).parent


class Side(Protocol):
    process: subprocess.Popen[str]

    def measure(self, concurrency: int, num_requests: int, seed: int) -> float:
        """Output tokens per second."""


class Server:
    """A side over HTTP. Prompts are text, or token ids, of the model in `directory`."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        url: str,
        model: str,
        directory: Path,
        *,
        ignore_eos: bool = True,
        sends_text: bool = True,
    ) -> None:
        self.process = process
        self._url, self._model, self._directory = url, model, directory
        self._ignore_eos, self._sends_text = ignore_eos, sends_text

    def config(self, prompt_len: int, output_len: int, seed: int) -> BenchConfig:
        """Of requests to it."""
        return BenchConfig(
            url=self._url,
            model=self._model,
            prompt_kind="text" if self._sends_text else "ids",
            prompt_len=prompt_len,
            output_len=output_len,
            vocab_size=json.loads((self._directory / "config.json").read_text())["vocab_size"],
            tokenizer=str(self._directory),
            ignore_eos=self._ignore_eos,
            seed=seed,
        )

    def measure(self, concurrency: int, num_requests: int, seed: int) -> float:
        config = self.config(PROMPT_LEN, OUTPUT_LEN, seed)
        prompts = make_prompts(config, num_requests)
        result = asyncio.run(run_level(config, concurrency, prompts))
        expected = num_requests * OUTPUT_LEN
        if result.num_failed or result.num_output_tokens < 0.98 * expected:
            raise SystemExit(
                f"{self._url}: {result.num_output_tokens}/{expected} tokens; {result.first_error}"
            )
        return result.output_tokens_per_s


class Generate:
    """Hugging Face `generate` with a static batch of `concurrency`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def measure(self, concurrency: int, num_requests: int, seed: int) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        rates = []
        for batch in range(max(1, num_requests // concurrency)):
            stdin.write(f"{concurrency} {PROMPT_LEN} {OUTPUT_LEN} {seed + batch}\n")
            stdin.flush()
            rates.append(float(stdout.readline()))
        return len(rates) / sum(1 / rate for rate in rates)


@contextmanager
def others_stopped(side: Side, sides: Iterable[Side]) -> Iterator[None]:
    """All other sides are stopped for as long as the block lasts."""
    others = [other for other in sides if other is not side]
    trees = [psutil.Process(other.process.pid) for other in others]
    stopped = [one for tree in trees for one in (tree, *tree.children(recursive=True))]
    for one in stopped:
        one.suspend()
    try:
        yield
    finally:
        for one in reversed(stopped):
            one.resume()


@contextmanager
def process(
    argv: list[str], log: Path, settings: Mapping[str, str] | None = None, **kwargs: object
) -> Iterator[subprocess.Popen[str]]:
    """Run `argv` for as long as the block lasts."""
    environment = _environment() | dict(settings or {})
    with log.open("w") as out:
        child = subprocess.Popen(argv, stderr=out, text=True, env=environment, **kwargs)  # type: ignore[call-overload]
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}


def wait_ready(url: str, child: subprocess.Popen[str], seconds: float = 180) -> float:
    """Seconds until `url` answers 200."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            if child.poll() is not None:
                break
            time.sleep(0.1)
    raise SystemExit(f"{url} did not come up; see its log")


@contextmanager
def sluice(model: Path, work: Path, extra: list[str]) -> Iterator[Server]:
    port = free_port()
    argv = [str(BIN / "sluice"), "serve", str(model), "--port", str(port), "--served-name", "bench", *extra]
    with process(argv, work / "sluice.log", stdout=subprocess.DEVNULL) as child:
        wait_ready(f"http://127.0.0.1:{port}/readyz", child)
        yield Server(child, f"http://127.0.0.1:{port}", "bench", model)


@contextmanager
def transformers_serve(model: Path, work: Path) -> Iterator[Side]:
    port = free_port()
    argv = [str(BIN / "transformers"), "serve", str(model), "--device", "cpu", "--port", str(port)]
    argv += ["--dtype", "bfloat16", "--continuous-batching", "--cb-num-blocks", "512"]
    argv += ["--cb-block-size", "32", "--cb-max-batch-tokens", "1024", "--log-level", "error"]
    with process(argv, work / "transformers.log", stdout=subprocess.DEVNULL) as child:
        wait_ready(f"http://127.0.0.1:{port}/health", child)
        # It refuses ignore_eos; the models' heads give end tokens no chance.
        yield Server(child, f"http://127.0.0.1:{port}", str(model), model, ignore_eos=False)


@contextmanager
def vllm(model: Path, work: Path, home: Path, dtype: str, max_model_len: int = 2048) -> Iterator[Server]:
    """`home`: what vllm_cpu.sh has made."""
    port = free_port()
    argv = [str(home / "bin/vllm"), "serve", str(model), "--dtype", dtype, "--port", str(port)]
    argv += ["--max-model-len", str(max_model_len), "--max-num-seqs", "128"]
    libraries = [*home.glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    settings["LD_PRELOAD"] = ":".join(map(str, libraries))
    with process(argv, work / "vllm.log", settings, stdout=subprocess.DEVNULL) as child:
        wait_ready(f"http://127.0.0.1:{port}/health", child, 600)
        yield Server(child, f"http://127.0.0.1:{port}", str(model), model)


@contextmanager
def llama_cpp(model: Path, work: Path, home: Path) -> Iterator[Side]:
    """`home`: what llama_cpp.sh has made."""
    port, weights, threads = free_port(), model / "model.gguf", str(os.cpu_count())
    if not weights.exists():
        writer = Path(__file__).parent / "write_gguf.py"
        subprocess.run([home / "bin/python", writer, model, weights], check=True)
    argv = [str(home / "bin/llama-server"), "-m", str(weights), "--port", str(port), "--threads", threads]
    argv += ["--threads-batch", threads, "--parallel", "32", "--ctx-size", "32768", "--cache-ram", "0"]
    with process(argv, work / "llama_cpp.log", stdout=subprocess.DEVNULL) as child:
        wait_ready(f"http://127.0.0.1:{port}/health", child)
        yield Server(child, f"http://127.0.0.1:{port}", "bench", model, sends_text=False)


@contextmanager
def hf_generate(model: Path, work: Path) -> Iterator[Side]:
    argv = [sys.executable, "-m", "tests.bench.hf_generate", str(model), str(os.cpu_count())]
    with process(argv, work / "generate.log", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise SystemExit("hf_generate did not start; see its log")
        yield Generate(child)


PEERS = {"transformers serve": transformers_serve, "generate": hf_generate}


def model_of(shape: Shape, directory: Path) -> Path:
    """A model of that shape in `directory`, made unless it is there."""
    if not (directory / "model.safetensors").exists():
        make_llama(directory, shape, dtype=torch.bfloat16, tokenizer=True)
    return directory


def bench_shape(name: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Every concurrency of one shape, all sides up."""
    model = model_of(SHAPES[name], args.models / name)
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            "sluice": stack.enter_context(sluice(model, args.models, args.serve_flag)),
        }
        if args.vllm:
            sides["vllm"] = stack.enter_context(vllm(model, args.models, args.vllm, args.vllm_dtype))
        if args.llama_cpp:
            sides["llama.cpp"] = stack.enter_context(llama_cpp(model, args.models, args.llama_cpp))
        sides |= {peer: stack.enter_context(PEERS[peer](model, args.models)) for peer in args.peers}
        return [_bench_level(name, sides, concurrency, args) for concurrency in args.concurrency]


def _bench_level(
    shape: str, sides: dict[str, Side], concurrency: int, args: argparse.Namespace
) -> dict[str, object]:
    num_requests = max(concurrency, args.min_requests)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(args.rounds + 1):  # the first warms every side up and does not count
        for side, measured in sides.items():
            with others_stopped(measured, sides.values()):
                rate = measured.measure(concurrency, num_requests, seed=1000 * concurrency + 100 * round_)
            if round_:
                rates[side].append(rate)
    row = {
        "shape": shape,
        "concurrency": concurrency,
        "tokens_per_s": {side: round(median(values), 1) for side, values in rates.items()},
        "spread": {side: [round(min(v), 1), round(max(v), 1)] for side, v in rates.items()},
        "ratio": {
            side: round(median(a / b for a, b in zip(rates["sluice"], values, strict=True)), 2)
            for side, values in rates.items()
            if side != "sluice"
        },
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="where the models are made (5 GB)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min-requests", type=int, default=2, help="requests of a measurement, at least")
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="of this environment"
    )
    parser.add_argument("--vllm", type=Path, help="the environment of vLLM's CPU build")
    parser.add_argument(
        "--vllm-dtype", default="bfloat16", help="without AVX-512 it is faster in float32 (default: bfloat16)"
    )
    parser.add_argument("--llama-cpp", type=Path, help="where llama.cpp's server was built")
    parser.add_argument("--serve-flag", action="append", default=[], help="passed on to `sluice serve`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    rows = [row for shape in args.shapes for row in bench_shape(shape, args)]
    record = {
        "command": " ".join(["python -m tests.bench.bench_peers", *_public(sys.argv[1:])]),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sluice")}
        | _vllm(args.vllm)
        | _llama_cpp(args.llama_cpp),
        "prompt_len": PROMPT_LEN,
        "output_len": OUTPUT_LEN,
        "rounds": args.rounds,
        **({"vllm dtype": args.vllm_dtype} if args.vllm else {}),
        "results": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def _vllm(home: Path | None) -> dict[str, str]:
    if home is None:
        return {}
    program = "from importlib.metadata import version; print(version('vllm_cpu'))"
    found = subprocess.run([home / "bin/python", "-c", program], capture_output=True, text=True, check=True)
    return {"vllm-cpu": found.stdout.strip()}


def _llama_cpp(home: Path | None) -> dict[str, str]:
    if home is None:
        return {}
    sources = [path.name for path in home.glob("source/llama_cpp_python-*") if path.is_dir()]
    return {"llama.cpp, in llama-cpp-python": sources[0].rpartition("-")[2]}


def _public(argv: list[str]) -> list[str]:
    """The arguments without this machine's paths."""
    return [Path(arg).name if arg.startswith("/") else arg for arg in argv]


if __name__ == "__main__":
    main()
