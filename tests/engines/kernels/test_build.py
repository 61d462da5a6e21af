"""Compiling the kernels: once, by one process, and a reason where it cannot be done."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.kernels import build, library


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a library would be put: neither there nor beside the sources is one."""
    monkeypatch.setattr(build, "_level_here", lambda: "x86-64-v3")
    path = tmp_path / "cache" / "kernels.so"
    monkeypatch.setattr(build, "_places", lambda level: [tmp_path / "none.so", path])
    return path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """The compiler is one that counts, and takes its time."""
    compiler = tmp_path / "g++"
    output = 'while [ "$1" != -o ]; do shift; done; touch "$2"'
    script(compiler, f"echo x >> {tmp_path}/runs; sleep 0.3; {output}")
    code = "import sys; from pathlib import Path; from engines.kernels import build; "
    code += "build.compile_for('x86-64-v3', Path(sys.argv[1]))"
    made = tmp_path / "cache" / "kernels.so"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [sys.executable, "-c", code, str(made)]
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert (tmp_path / "runs").read_text().split() == ["x"]
    assert made.exists()


def test_without_a_compiler_torch_does_the_work(
    nothing_built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert library.load() is None
    assert library.reason().startswith("cannot be had: neither g++")
    assert "neither g++ nor clang++" in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"), [("echo 'bad flag' >&2; exit 1", "bad flag"), ("exit 3", "exit status 3")]
)
def test_a_compiler_that_fails_is_named_with_its_first_words(
    nothing_built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    script(tmp_path / "g++", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(build.Unavailable, match=reason):
        build.find()
    assert not nothing_built.exists()


def test_a_cache_that_cannot_be_written_is_a_reason(
    tmp_path: Path, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    with pytest.raises(build.Unavailable, match="cache"):
        build.find()


def test_another_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: {"asimd"})
    with pytest.raises(build.Unavailable, match="x86"):
        build.find()


def test_the_best_level_that_the_processor_has_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = list(build._LEVELS)
    for place, level in enumerate(levels):
        flags = set().union(*(build._LEVELS[other] for other in levels[place:]), {"sse2"})
        monkeypatch.setattr(build, "_processor_flags", lambda flags=flags: flags)
        assert build._level_here() == level


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "off")
    assert library.load() is None
    assert library.SWITCH in library.reason()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("level", build._LEVELS)
def test_the_sources_compile_for_every_level(tmp_path: Path, level: str) -> None:
    path = build.compile_for(level, tmp_path / f"{level}.so")
    assert path.stat().st_size > 10_000
