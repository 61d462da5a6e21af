"""Damaged and hostile checkpoints, read in one process that must live through all of them:

    python -m tests.soak.convert_hostile [--trials N] [--json FILE]

N files with bytes changed, cut out, doubled or cut off, of every format; and every pickle of
tests/conversion/hostile.py, as torch saves today and as it did before 1.6. Damaged files are refused by the
reader or by their checksums, the same model still, or without any checksum that could tell; pickles are
refused with nothing of them run. Anything else ends it with 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from conversion.pickled import read_pickled
from engines.base import BadCheckpoint
from tests.conversion.hostile import as_pth, payloads
from tests.conversion.mutate import campaign
from tests.soak import _figures

SEED = 0


def refuse_pickles(root: Path) -> int:
    """How many. Raises AssertionError."""
    canary, refused = root / "canary", 0
    for what, content in payloads(canary):
        for number, data in enumerate((as_pth(content), content)):
            path = root / f"consolidated.0{number}.pth"
            path.write_bytes(data)
            try:
                read_pickled(path)
            except BadCheckpoint:
                refused += 1
            else:
                raise AssertionError(f"{what}: was read")
            assert not canary.exists(), f"{what}: has run"
    return refused


def run(trials: int) -> dict[str, object]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as pickles, tempfile.TemporaryDirectory() as shards:
        try:
            refused = refuse_pickles(Path(pickles))
            outcomes = campaign(Path(shards), trials, SEED)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            return {"failed": 1, "failure": f"{type(error).__name__}: {error} {notes}"[:2000]}
    return {"pickles_refused": refused, "files_damaged": trials, "outcomes": dict(outcomes), "failed": 0}


if __name__ == "__main__":
    _figures.main("convert_hostile", __doc__, 1000, run)
