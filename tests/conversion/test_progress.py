"""What a conversion tells into a file or a pipe."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.progress import Lines
from conversion.sizes import shown_bytes


def told(total: int, *steps: tuple[float, int]) -> list[str]:
    """The lines of a conversion that writes so many bytes at these times."""
    now, stream = [0.0], io.StringIO()
    lines = Lines(stream, total, clock=lambda: now[0])
    for time, num_bytes in steps:
        now[0] = time
        lines.advance("file", num_bytes)
    return stream.getvalue().splitlines()


def test_a_slow_one_tells_every_ten_seconds() -> None:
    steps = [(float(second), 1 << 20) for second in range(1, 36)]
    lines = told(1 << 30, *steps)
    assert [line.split(":")[0].strip() for line in lines] == ["1%", "2%", "3%"]
    assert lines[0] == "  1%: 10.5 MB of 1.1 GB, 1.0 MB/s, 1014 s left"


def test_a_faster_one_tells_every_tenth() -> None:
    lines = told(1000, *[(number / 20, 10) for number in range(1, 101)])
    shown = [int(line.split("%")[0]) for line in lines]
    assert shown == [20, 40, 60, 80, 100]  # a tenth takes half a second, a line comes each second
    assert len(told(1000, *[(number / 5, 10) for number in range(1, 101)])) == 10


def test_one_that_takes_no_second_tells_nothing() -> None:
    assert told(1000, *[(number / 1000, 100) for number in range(1, 11)]) == []


def test_lines_go_into_a_pipe_and_not_into_the_output() -> None:
    """With a clock that is eleven seconds later at each look."""
    program = (
        "import itertools, sys, time\n"
        "seconds = itertools.count(0, 11)\n"
        "time.monotonic = lambda: float(next(seconds))\n"
        "from conversion.progress import shown\n"
        "with shown(100, as_json=False) as progress:\n"
        "    progress.start('file', 100)\n"
        "    progress.advance('file', 50)\n"
    )
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "  50%: 50 bytes of 100 bytes, 5 bytes/s, 11 s left\n")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (5_812_345, "5.8 MB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.0 GB"),
        (16_060_556_376, "16.1 GB"),
        (141_107_412_992, "141 GB"),
        (1 << 60, "1,152,922 TB"),
    ],
)
def test_sizes_are_in_a_unit_that_fits(num_bytes: int, text: str) -> None:
    assert shown_bytes(num_bytes) == text
