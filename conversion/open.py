"""Opens a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path

from conversion.hf import is_hf, open_hf
from conversion.meta import is_meta, open_meta
from conversion.problems import BadTensors
from conversion.ranks import is_ranks, open_ranks
from conversion.source import Choices, Source
from conversion.tensors import CannotConvert
from engines.base import BadCheckpoint

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_FEW = 4


def open_checkpoint(root: Path, choices: Choices | None = None) -> Source:
    """Raises BadCheckpoint, BadModelDir, UnsupportedModel, CannotConvert; each names the file."""
    source = examine(root, choices or Choices())
    if source.problems:
        raise BadTensors(source.problems)
    return source


def examine(root: Path, choices: Choices) -> Source:
    """As open_checkpoint, but tensors that are missing, unknown or oddly shaped are only told."""
    source = _open(root, choices)
    _refuse_contradictions(source, choices)
    return source


def _open(root: Path, choices: Choices) -> Source:
    if root.is_file():
        raise BadCheckpoint(f"{root}: is a file: give the directory that it lies in")
    if not root.is_dir():
        raise BadCheckpoint(f"{root}: no such directory")
    if is_ranks(root):
        return open_ranks(root, choices)
    if is_hf(root):
        return open_hf(root, choices)
    if is_meta(root):
        return open_meta(root, choices)
    there = sorted(path.name for path in root.iterdir() if path.suffix in _WEIGHTS)
    beside = (
        f" ({', '.join(there[:_FEW])}{', ...' if len(there) > _FEW else ''} alone is none)" if there else ""
    )
    raise BadCheckpoint(
        f"{root}: holds no checkpoint that is known{beside}: copy or download what is missing of one: "
        "model.safetensors or pytorch_model.bin (several: with their index.json), consolidated.NN.pth with "
        "params.json, or what sluice convert writes, with its manifest.json"
    )


def _refuse_contradictions(source: Source, choices: Choices) -> None:
    """An option fills a gap; it does not change what a checkpoint says."""
    config = source.config
    factor = config.rope.llama3.factor if config.rope.llama3 is not None else 1.0
    for option, chosen, stated in (
        ("--rope-theta", choices.rope_theta, config.rope.theta),
        ("--rope-scaling-factor", choices.rope_scaling_factor, factor),
        ("--max-positions", choices.max_positions, config.max_positions),
    ):
        if chosen is not None and chosen != stated:
            raise CannotConvert(f"{option} {chosen:g}: {source.root} says {stated:g}: remove the option")
