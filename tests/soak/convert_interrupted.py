"""Conversions that are killed, or run out of room, at random points:

    python -m tests.soak.convert_interrupted [--trials N] [--json FILE]

N kills, and N / 8 each of file-size limits and of disks that fill up underway (a small tmpfs). What is left
must be nothing, or the complete model; what was stopped must be resumed to it. Counts those that came in the
middle; ends with 1 at the first wrong outcome.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.conversion.interrupted import kills, make_source, on_a_small_disk, size_limits
from tests.soak import _figures

SEED = 0


def run(trials: int) -> dict[str, object]:
    torch.set_num_threads(1)
    share = -(-trials // 8)
    figures: dict[str, object] = {"kills": trials, "size_limits": share, "full_disks": share}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = make_source(root)
        try:
            figures["kills_in_the_middle"] = kills(source, root, trials, SEED)
            figures["size_limits_in_the_middle"] = size_limits(source, root, share, SEED)
            stopped = on_a_small_disk(source, root / "disk", share, SEED)
            figures["full_disks_in_the_middle"] = stopped
            if stopped is None:
                figures["full_disks"] = 0
        except AssertionError as error:
            return {**figures, "failed": 1, "failure": str(error)[-2000:]}
    return {**figures, "failed": 0}


if __name__ == "__main__":
    _figures.main("convert_interrupted", __doc__, 200, run)
