"""The converter against `cp` with `sha256sum`, and against transformers 4's own converter.

    python -m tests.bench.bench_convert --gb 8 --directory DIR [--transformers4 DIR]

Writes a random Meta checkpoint of about that size (its tensors have the shapes of a Llama, its values are
random bits of bfloat16 numbers), then converts it to files for four ranks and to Hugging Face's. They
take turns, each starting with nothing left to write to the disk and the source in the page cache; times are
the best of the rounds, memory is the peak of private (anonymous) pages, sampled. Sluice returns when its
files are on the disk; the others leave that to the kernel.

--transformers4 names a directory made by
    pip install --target DIR --no-deps transformers==4.40.2 tokenizers==0.19.1 huggingface-hub==0.29.3 \
        requests==2.34.2 urllib3==2.8.0 idna==3.20 certifi==2026.10.18 charset-normalizer==3.5.2
later transformers leave the converter out. Room for three times the size is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path

import numpy as np

from conversion.hashed import HashedFile
from conversion.params import to_params
from conversion.pth import PthWriter
from engines.models.config import LlamaConfig
from engines.models.names import expected_tensors
from gateway.bench import machine
from tests.models import Shape

UNCHECKED = "--no-check-source"  # as cp and transformers: neither compares the source with its checksums
_SAMPLE_SECONDS = 0.05

Run = Callable[[Path, Path], "Measured"]


@dataclass(frozen=True)
class Measured:
    """Of all processes of the command: `cpu_seconds` of all cores, the peak of private memory."""

    seconds: float
    cpu_seconds: float
    private_mb: float


def shape_of(gb: float) -> Shape:
    """A Llama 2 7B with as many layers as the size wants. The other converter fails on fewer K/V heads."""
    layer = 2 * (4096 * 4096 * 4 + 3 * 4096 * 11008)
    ends = 2 * 2 * 32000 * 4096
    layers = max(1, round((gb * 1e9 - ends) / layer))
    if gb < 0.8:  # a narrower one: a single wide layer would be most of it
        layers = max(1, round((gb * 1e9 - ends / 4) / (layer / 16)))
        return Shape(hidden=1024, layers=layers, heads=8, kv_heads=8, head_dim=128, ffn=2752, vocab=32000)
    return Shape(hidden=4096, layers=layers, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000)


def write_meta(directory: Path, shape: Shape) -> int:
    """One shard. Returns the bytes of its tensors."""
    import torch

    directory.mkdir()
    config = LlamaConfig.parse(shape.config_json(torch.bfloat16), "config.json")
    tensors = [(spec.meta_name, "BF16", spec.shape) for spec in expected_tensors(config).values()]
    rng, total = np.random.default_rng(0), 0
    with HashedFile(directory / "consolidated.00.pth") as out:
        writer = PthWriter(out, "consolidated", tensors)
        for index, (_, _, shape_) in enumerate(tensors):
            left = 2 * int(np.prod(shape_))
            total += left
            with writer.storage(index) as write:
                while left:
                    bits = rng.integers(0, 1 << 16, min(left, 1 << 23) // 2, dtype=np.uint16)
                    write(((bits & 0x87FF) | 0x3800).view(np.uint8).data)  # finite, between 2^-15 and 2
                    left -= bits.nbytes
        writer.close()
        out.sync()
    params = {**to_params(config, shape.vocab), "rope_theta": 10000.0}
    (directory / "params.json").write_text(json.dumps(params))
    return total


def private_mb(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        match = re.search(r"RssAnon:\s+(\d+)", text)
        total += int(match[1]) if match else 0
    return total / 1024


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [child for found in text.split() for child in (int(found), *children(int(found)))]


def measure(argv: Sequence[str], env: dict[str, str] | None = None) -> Measured:
    """Raises SystemExit with the output if the command fails."""
    os.sync()
    start, cpu, peak = time.perf_counter(), cpu_of_children(), 0.0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **(env or {})})
        while process.poll() is None:
            peak = max(peak, private_mb([process.pid, *children(process.pid)]))
            time.sleep(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(argv)}: {log.read()}")
    return Measured(seconds, cpu_of_children() - cpu, peak)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cp_and_hash(source: Path, target: Path) -> Measured:
    script = 'cp -r "$0" "$1" && sha256sum "$1"/*.pth'
    return measure(["bash", "-c", script, str(source), str(target)])


def sluice(source: Path, target: Path, *how: str) -> Measured:
    """As the command `sluice convert` in a fresh process."""
    program = "from gateway.cli import main; main()"
    return measure([sys.executable, "-c", program, "convert", str(source), str(target), *how])


def transformers4(library: Path, source: Path, target: Path) -> Measured:
    """Its function, without its command: that wants a tokenizer."""
    program = (
        "import sys\n"
        "from transformers.models.llama.convert_llama_weights_to_hf import write_model\n"
        "write_model(sys.argv[2], sys.argv[1], '7B')\n"
    )
    argv = [sys.executable, "-c", program, str(source), str(target)]
    return measure(argv, {"PYTHONPATH": str(library)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--transformers4", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        root = Path(scratch)
        total = write_meta(root / "meta", shape_of(args.gb))
        runs: dict[str, Run] = {
            "cp, sha256sum": cp_and_hash,
            "sluice, tp 4": lambda a, b: sluice(a, b, "--to", "sluice", "--tp", "4", UNCHECKED),
            "sluice, hf": lambda a, b: sluice(a, b, "--to", "hf", UNCHECKED),
            "sluice, tp 4, source checked": lambda a, b: sluice(a, b, "--to", "sluice", "--tp", "4"),
        }
        if args.transformers4:
            runs["transformers 4"] = lambda a, b: transformers4(args.transformers4, a, b)
        measured: dict[str, list[Measured]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                measured[name].append(run(root / "meta", root / "out"))
                shutil.rmtree(root / "out")
    report(total, measured, args)


def report(total: int, measured: dict[str, list[Measured]], args: argparse.Namespace) -> None:
    best = {name: min(run.seconds for run in runs) for name, runs in measured.items()}
    print(f"{total / 1e9:.2f} GB of tensors, {os.cpu_count()} cores")
    print(f"{'':30}{'seconds':>9}{'GB/s':>7}{'CPU s':>8}{'private MB':>12}")
    for name, runs in measured.items():
        cpu, memory = min(run.cpu_seconds for run in runs), max(run.private_mb for run in runs)
        print(f"{name:30}{best[name]:9.2f}{total / 1e9 / best[name]:7.2f}{cpu:8.2f}{memory:12.0f}")
    ratios = {
        f"{name} over {peer}": round(best[peer] / best[name], 2)
        for name in best
        for peer in best
        if name.startswith("sluice") and not peer.startswith("sluice")
    }
    for name, ratio in ratios.items():
        print(f"speed of {name}: {ratio}")
    if args.json is not None:
        peers = () if args.transformers4 is None else distributions(path=[str(args.transformers4)])
        record = {
            "command": f"python -m tests.bench.bench_convert --gb {args.gb:g} --rounds {args.rounds}",
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "numpy", "sluice")},
            "peer": {peer.name: peer.version for peer in peers},
            "bytes": total,
            "speed_ratios": ratios,
            "runs": {name: [asdict(run) for run in runs] for name, runs in measured.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
