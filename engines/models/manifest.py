"""The per-rank layout: one safetensors file for each rank of tp x pp, and manifest.json, written last.

A file holds its rank's slices under Hugging Face's names, projections that the engine fuses side by
side, so that a rank maps its file and copies nothing. `sluice convert --to sluice` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engines.base import BadCheckpoint

if TYPE_CHECKING:
    from engines.models.checkpoint import StoredTensor

MANIFEST_NAME = "manifest.json"
FORMAT = "sluice"
_MAX_RANKS = 1024


class WrittenTensor(msgspec.Struct, frozen=True):
    """A tensor as one file holds it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    is_finite: bool = True
    error: float | None = None  # of quantised values: root of the squared error over that of the squares


class WrittenFile(msgspec.Struct, frozen=True):
    """A file of a checkpoint; `tensors` by their names in it."""

    num_bytes: int
    sha256: str
    tensors: dict[str, WrittenTensor] = {}


class Layout(msgspec.Struct, frozen=True):
    """How the tensors are divided. `stages`: first and last + 1 layer of each."""

    tp: int
    pp: int
    stages: list[tuple[int, int]]
    vocab_size: int
    padded_vocab_size: int
    kv_replicas: int  # how many ranks hold the same K/V head
    is_tied: bool
    quantization: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError: the file is not to be trusted."""
        if not (1 <= self.tp <= _MAX_RANKS and 1 <= self.pp <= _MAX_RANKS):
            raise ValueError(f"tp and pp must be 1 to {_MAX_RANKS}")
        if len(self.stages) != self.pp:
            raise ValueError(f"stages must be {self.pp}")


class Manifest(msgspec.Struct, frozen=True):
    """manifest.json. `config` is Hugging Face's config.json, `layout` that of format sluice and meta."""

    tool: str
    format: str
    config: dict[str, object]
    files: dict[str, WrittenFile]
    layout: Layout | None = None
    source: dict[str, str] = {}


def read_manifest(directory: Path) -> Manifest | None:
    """None where there is none. Raises BadCheckpoint: cannot be read, not ours."""
    path = directory / MANIFEST_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        wrong = f"{path}: is not a manifest of sluice convert: {error}"
        raise BadCheckpoint(f"{wrong}: copy it again, or remove it if it is another program's") from None


def rank_file(tp_rank: int, tp: int, stage: int, pp: int) -> str:
    """The file of a rank, relative to the directory."""
    return f"tp{tp_rank}-of-{tp}/pp{stage}-of-{pp}.safetensors"


def read_rank(directory: Path, layout: Layout, tp_rank: int, stage: int) -> dict[str, StoredTensor]:
    """The tensors of one rank's file. Raises BadCheckpoint; also if it is another rank's, renamed."""
    from engines.models.checkpoint import read_header_and_metadata  # imports torch; a manifest needs none

    name = rank_file(tp_rank, layout.tp, stage, layout.pp)
    path = directory / name
    tensors, metadata = read_header_and_metadata(path)
    if metadata.get("sluice_rank") != name:
        raise BadCheckpoint(
            f"{path}: is not the file of this rank: it was written as {metadata.get('sluice_rank')}"
        )
    return tensors
