"""What every reader returns: a model as logical tensors, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from conversion.tensors import LogicalTensor
from engines.models.config import LlamaConfig
from engines.models.manifest import Manifest

Format = Literal["hf", "meta", "sluice"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that has been opened: headers are read and checked, weights are mapped.

    `tensors` are those of `config`, in its order, under Hugging Face's names. `layout` is for people.
    """

    root: Path
    format: Format
    layout: str
    config: LlamaConfig
    config_json: Json  # Hugging Face's config.json, made up where the format has none
    tensors: Mapping[str, LogicalTensor]
    files: tuple[Path, ...]
    ignored: tuple[str, ...] = ()  # names of tensors that are not converted
    notes: tuple[str, ...] = ()  # what was concluded, for the user to check
    problems: tuple[str, ...] = ()  # tensors that are missing, unknown or oddly shaped: only to be shown
    manifest: Manifest | None = None
    replicas: tuple[tuple[LogicalTensor, LogicalTensor], ...] = field(default=(), repr=False)
    """Pairs that must be equal: the same tensor, as different shards store it."""

    @property
    def quantization(self) -> str | None:
        """Of the projections: int8, fp8, or None."""
        layout = self.manifest.layout if self.manifest is not None and self.format == "sluice" else None
        return None if layout is None else layout.quantization


@dataclass(frozen=True, slots=True)
class Choices:
    """What a source may leave open, as the user says it. None: not said."""

    rope_theta: float | None = None
    rope_scaling_factor: float | None = None
    max_positions: int | None = None
    allow_extra: bool = False

    @property
    def options(self) -> list[str]:
        """As the command line's words."""
        values = {
            "--rope-theta": self.rope_theta,
            "--rope-scaling-factor": self.rope_scaling_factor,
            "--max-positions": self.max_positions,
        }
        words = [
            word for name, value in values.items() if value is not None for word in (name, f"{value:.17g}")
        ]
        return words + (["--allow-extra"] if self.allow_extra else [])
