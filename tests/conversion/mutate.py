"""Opens and reads many damaged checkpoints in one process: it must end by itself.

A damaged file is refused with a clear error when it is opened or by its checksums, which `convert` looks at
by default, or it is the model that it was (an unused byte has changed), or nothing says what it was: a plain
safetensors file and a config.json carry no checksum. Anything else, a crash above all, is a failure.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from conversion.main import USER_ERRORS
from conversion.open import open_checkpoint
from conversion.plan import Target
from conversion.source import Source
from conversion.verify import check_source
from tests.conversion.helpers import convert
from tests.conversion.hostile import mutated
from tests.models import Shape, make_llama

SHAPE = Shape(hidden=24, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=24, vocab=24)


def read_all(source: Source) -> str:
    """Of every byte of every tensor, and the configuration."""
    digest = hashlib.sha256(repr(source.config).encode())
    for tensor in source.tensors.values():
        rows = tensor.read(np.arange(tensor.num_rows, dtype=np.int64))
        digest.update(f"{tensor.name} {tensor.dtype}".encode() + rows.tobytes())
    return digest.hexdigest()


def victims(root: Path) -> list[Path]:
    """One file of each format."""
    hf = make_llama(root / "hf", SHAPE)
    convert(hf, root / "meta", Target("meta", shards=2))
    convert(hf, root / "ranks", Target("sluice", tp=2))
    convert(hf, root / "indexed", Target("hf", max_file_bytes=4096))
    torch_made = root / "torch"
    shutil.copytree(root / "meta", torch_made)
    (torch_made / "manifest.json").unlink()
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


def outcome(directory: Path, original: str) -> str:
    """`original`: what read_all gave of it."""
    try:
        source = open_checkpoint(directory)
        now = read_all(source)
    except USER_ERRORS:
        return "refused"
    try:
        has_checksums = bool(check_source(source))
    except USER_ERRORS:
        return "refused by its checksums"
    if now == original:
        return "the same model"
    assert not has_checksums, "changed values are accepted, though checksums say what they were"
    return "changed, without checksums"


def top(root: Path, path: Path) -> Path:
    return root / path.relative_to(root).parts[0]


def campaign(root: Path, count: int, seed: int) -> Counter[str]:
    rng, outcomes = random.Random(seed), Counter[str]()
    files = victims(root)
    originals = {top(root, path): read_all(open_checkpoint(top(root, path))) for path in files}
    for number in range(count):
        path = files[number % len(files)]
        original = path.read_bytes()
        try:
            path.unlink()  # never under a mapping that is still open
            path.write_bytes(mutated(original, rng))
            outcomes[outcome(top(root, path), originals[top(root, path)])] += 1
        except Exception as error:
            error.add_note(f"mutation {number} of {path.name}, seed {seed}")
            raise
        finally:
            path.unlink()
            path.write_bytes(original)
    after = {outcome(directory, original) for directory, original in originals.items()}
    assert after == {"the same model"}, "each was put back"
    return outcomes
