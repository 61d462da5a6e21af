"""Checks and measures everything on one GPU: `python -m tests.bench.bench_gpu --work DIR --json FILE`.

The tests of kernels; then speed, beside the device's own limits: decoding and prompts of a model of
Llama-3-8B's shape with random weights in bf16, fp8 and int8, attention alone, how long the device idles,
requests through the engine, its peers and the server; last the tests of whole groups, as far as there is
time. What each section measures is in its module under tests/bench/gpu. A section that fails, hangs or lacks
a package says so in the record, and the others go on; each number is printed, and the file written, as soon
as it is there. What did not come in time, `--only SECTION ...` makes up for.

Rehearse on a CPU with `--device cpu --shape tiny`: what needs no GPU runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from tests.bench.gpu.bench import Found
from tests.bench.gpu.options import SHAPES, Options
from tests.bench.gpu.worker import Section, Worker

_GPU = "tests.bench.gpu"
SECTIONS = {
    "kernel-tests": Section(f"{_GPU}.checks:kernels", "tests", 180),
    "model": Section(f"{_GPU}.model:make", "engine", 180),
    "limits": Section(f"{_GPU}.limits:measure", "engine", 60),
    "decode": Section(f"{_GPU}.decode:measure", "engine", 180),
    "prefill": Section(f"{_GPU}.prefill:measure", "engine", 90),
    "fp8": Section(f"{_GPU}.quantized:measure_fp8", "engine", 120),
    "int8": Section(f"{_GPU}.quantized:measure_int8", "engine", 120),
    "idle": Section(f"{_GPU}.idle:measure", "engine", 90),
    "offline": Section(f"{_GPU}.offline:measure", "engine", 120),
    "attention": Section(f"{_GPU}.attention:measure", "attention", 90),
    "peers": Section(f"{_GPU}.peers:measure", "peers", 180),
    "http": Section(f"{_GPU}.served:measure", "http", 210),
    "group-tests": Section(f"{_GPU}.checks:groups", "tests", 480),
    "deepspeed": Section(f"{_GPU}.peers:measure_deepspeed", "deepspeed", 360),
}
"""In the order in which they run, for later ones compare with what earlier ones found."""
PACKAGES = ("torch", "triton", "transformers", "numpy", "deepspeed")
GRACE_SECONDS = 30.0
"""That a section has beyond the deadline, if it was begun before."""


class Report:
    """The record: printed line by line, and in a file that is whole at any time."""

    def __init__(self, path: Path | None, header: dict[str, Any], names: Sequence[str]) -> None:
        self._path, self._header = path, header
        self.sections: Found = _found_before(path, header, names)

    def put(self, section: str, part: str, value: Any) -> None:
        self.sections.setdefault(section, {})[part] = value
        print(json.dumps({"section": section, part: value}), flush=True)
        if self._path is not None:
            text = json.dumps(self._header | {"sections": self.sections}, indent=2) + "\n"
            written = self._path.with_name(self._path.name + ".part")
            written.write_text(text, encoding="utf-8")
            written.replace(self._path)

    @property
    def is_good(self) -> bool:
        """Whether nothing failed; what was skipped has not."""
        parts = [(name, part) for found in self.sections.values() for name, part in found.items()]
        return not any(
            name == "error" or (isinstance(part, dict) and "error" in part) for name, part in parts
        )


def _found_before(path: Path | None, header: dict[str, Any], names: Sequence[str]) -> Found:
    """What an earlier run with the same options and versions has put into the file, but for `names`, which
    are run now."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    if any(before[name] != header[name] for name in ("options", "versions")):
        sys.exit(f"{path.name} is of a run with other options or versions: move it, or name another --json")
    return {name: found for name, found in before["sections"].items() if name not in names}


def run(names: Sequence[str], options: Options, report: Report, ends: float) -> None:
    """One section after the other, until `ends`. Those of one process share it for as long as it is sound."""
    worker: Worker | None = None
    process = ""
    try:
        for name in names:
            section, left = SECTIONS[name], ends - monotonic()
            if left <= 0:
                report.put(name, "skipped", "the deadline had passed")
                continue
            if worker is not None and process != section.process:
                worker.end()
                worker = None
            if worker is None:
                worker, process = Worker(options, report.sections), section.process
            started = monotonic()
            is_sound = worker.run(name, section, min(section.seconds, left + GRACE_SECONDS), report.put)
            report.put(name, "took_s", round(monotonic() - started, 1))
            if not is_sound:
                worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    command = ["python -m tests.bench.bench_gpu", *_public(sys.argv[1:])]
    left_out = ("work", "json", "only", "deadline")
    options = {name: value for name, value in vars(args).items() if name not in left_out}
    return {"command": " ".join(command), "options": options, "versions": versions}


def _public(argv: Sequence[str]) -> list[str]:
    """The arguments without this machine's paths."""
    return [Path(arg).name if arg.startswith("/") else arg for arg in argv]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="where models (16 GB; 34 with deepspeed) and logs go"
    )
    parser.add_argument("--json", type=Path, help="the record")
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SECTIONS),
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"some of: {', '.join(SECTIONS)}; what FILE has of others stays",
    )
    parser.add_argument("--deadline", type=float, default=540, help="seconds; what is left then is skipped")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], help="sequences that decode")
    parser.add_argument("--context", type=int, default=1024, help="of each of them")
    parser.add_argument("--steps", type=int, default=50, help="decoding steps that are timed")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the one long prompt")
    parser.add_argument("--requests", type=int, default=64, help="for the engine, its peers and the server")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each of them")
    parser.add_argument("--output", type=int, default=128, help="that each of them generates")
    return parser.parse_args()


def main() -> None:
    ends = monotonic()
    args = parse()
    ends += args.deadline
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device; rehearse with --device cpu --shape tiny")
    for directory in (args.work, *([args.json.parent] if args.json else [])):
        directory.mkdir(parents=True, exist_ok=True)
    options = Options(
        work=args.work.absolute(),
        shape_name=args.shape,
        device_type=args.device,
        batches=tuple(args.batch),
        context=args.context,
        steps=args.steps,
        prefill=args.prefill,
        num_requests=args.requests,
        prompt_len=args.prompt,
        output_len=args.output,
    )
    names = [name for name in SECTIONS if name in args.only]
    report = Report(args.json, header(args), names)
    run(names, options, report, ends)
    sys.exit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
