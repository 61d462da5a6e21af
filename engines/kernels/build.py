"""Compiles the C++ of this directory, once for each level of processor.

`python -m engines.kernels.build` does it ahead, for all levels, and puts the results beside the sources; else
the first start that finds none compiles for its own level, in some seconds, into the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("sluice.engine")

_HERE = Path(__file__).parent
_HEADERS = ("attention.h", "prompt_attention.h", "linear.h", "pack.h", "ranks.h", "team.h", "vec.h")
_SOURCES = ("llama.cpp", *_HEADERS)
_FLAGS = ("-O3", "-std=c++17", "-pthread", "-fPIC", "-shared", "-fno-math-errno")
_V4 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_LEVELS = {
    "x86-64-v4-bf16-vbmi": _V4 | {"avx512_bf16", "avx512_vnni", "avx512vbmi"},
    "x86-64-v4-bf16": _V4 | {"avx512_bf16", "avx512_vnni"},
    "x86-64-v4": _V4,
    "x86-64-v3": frozenset({"avx2", "fma", "bmi2"}),
}
"""Of x86 processors, the best first, with what Linux calls the instructions that tell them apart."""
_V4_BF16 = ("x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_ARCHITECTURES = {"x86-64-v4-bf16-vbmi": (*_V4_BF16, "-mavx512vbmi"), "x86-64-v4-bf16": _V4_BF16}
"""What the compiler calls a level, where it has no such name."""
_COMPILE_SECONDS = 300


class Unavailable(Exception):  # noqa: N818
    """Why there are no kernels."""


def find() -> Path:
    """The library for this processor, compiled if need be. Raises Unavailable."""
    level = _level_here()
    places = _places(level)
    return next((path for path in places if path.exists()), None) or compile_for(level, places[-1])


def _level_here() -> str:
    flags = _processor_flags()
    level = next((level for level, needed in _LEVELS.items() if needed <= flags), None)
    if level is None:
        raise Unavailable(f"they are for x86 processors with AVX2, this is {platform.machine()}")
    return level


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _places(level: str) -> list[Path]:
    """Where it may lie: beside the sources, or in the user's cache."""
    content = b"".join((_HERE / name).read_bytes() for name in _SOURCES) + " ".join(_FLAGS).encode()
    name = f"kernels-{level}-{hashlib.sha256(content).hexdigest()[:12]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [_HERE / name, cache / "sluice" / name]


def compile_for(level: str, path: Path) -> Path:
    """Make it at `path`. Of several processes one compiles and the others wait. Raises Unavailable."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("neither g++ nor clang++ is there to compile them")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "kernels.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _run(compiler, level, path)
    except OSError as error:
        raise Unavailable(f"{path.parent}: {error.strerror}") from error
    return path


def _options(level: str) -> tuple[str, ...]:
    """What has the compiler make code for it."""
    architecture, *more = _ARCHITECTURES.get(level, (level,))
    return (f"-march={architecture}", *more)


def _run(compiler: str, level: str, path: Path) -> None:
    log.info("kernels: compiled for %s, once", level)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory, path.name)
        command = [compiler, *_FLAGS, *_options(level), "-o", str(made), str(_HERE / _SOURCES[0])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler} took more than {_COMPILE_SECONDS} s") from None
        if done.returncode:
            words = done.stderr.strip() or f"exit status {done.returncode}"
            raise Unavailable(f"{compiler} failed: {words.splitlines()[0]}")
        os.replace(made, path)


def main() -> None:
    for level in _LEVELS:
        try:
            print(compile_for(level, _places(level)[0]))
        except Unavailable as error:
            sys.exit(f"no kernels for {level}: {error}; torch does without, slower")


if __name__ == "__main__":
    main()
