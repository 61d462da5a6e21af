"""Opens and reads many damaged checkpoints in one process: it must end by itself.

A damaged file is refused with a clear error, or it is still a checkpoint (a value has changed, which only
its manifest can tell). Anything else, a crash above all, is a failure.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from conversion.main import USER_ERRORS
from conversion.open import open_checkpoint
from conversion.plan import Target
from conversion.verify import check_manifest
from engines.models.manifest import read_manifest
from tests.conversion.helpers import convert
from tests.conversion.hostile import mutated
from tests.models import Shape, make_llama

SHAPE = Shape(hidden=24, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=24, vocab=24)


def read_all(directory: Path) -> None:
    """Every byte of every tensor."""
    for tensor in open_checkpoint(directory).tensors.values():
        tensor.read(np.arange(tensor.num_rows, dtype=np.int64)).sum()


def victims(root: Path) -> list[Path]:
    """One file of each format."""
    hf = make_llama(root / "hf", SHAPE)
    convert(hf, root / "meta", Target("meta", shards=2))
    convert(hf, root / "ranks", Target("sluice", tp=2))
    convert(hf, root / "indexed", Target("hf", max_file_bytes=4096))
    torch_made = root / "torch"
    shutil.copytree(root / "meta", torch_made)
    for path in torch_made.glob("*.pth"):
        torch.save(torch.load(path, weights_only=True), path)
    return [
        root / "hf" / "model.safetensors",
        root / "meta" / "consolidated.01.pth",
        torch_made / "consolidated.00.pth",
        root / "ranks" / "tp1-of-2" / "pp0-of-1.safetensors",
        root / "ranks" / "manifest.json",
        root / "indexed" / "model.safetensors.index.json",
        root / "meta" / "params.json",
        root / "hf" / "config.json",
    ]


def outcome(directory: Path) -> str:
    try:
        read_all(directory)
    except USER_ERRORS:
        return "refused"
    try:
        manifest = read_manifest(directory)
        if manifest is not None:
            check_manifest(directory, manifest)
    except USER_ERRORS:
        return "found by its hash"
    return "still a checkpoint"


def top(root: Path, path: Path) -> Path:
    return root / path.relative_to(root).parts[0]


def campaign(root: Path, count: int, seed: int) -> Counter[str]:
    rng, outcomes = random.Random(seed), Counter[str]()
    files = victims(root)
    for number in range(count):
        path = files[number % len(files)]
        original = path.read_bytes()
        try:
            path.unlink()  # never under a mapping that is still open
            path.write_bytes(mutated(original, rng))
            outcomes[outcome(top(root, path))] += 1
        except Exception as error:
            error.add_note(f"mutation {number} of {path.name}, seed {seed}")
            raise
        finally:
            path.unlink()
            path.write_bytes(original)
    assert all(outcome(top(root, path)) != "refused" for path in files), "each was put back"
    return outcomes
