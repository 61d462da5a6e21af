"""Opens the per-rank layout that engines/models/manifest.py describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from conversion.mapped import MappedFiles
from conversion.problems import absent, collect
from conversion.source import Choices, Source
from conversion.tensors import LogicalTensor, Part, replicas
from engines.base import BadCheckpoint
from engines.models.checkpoint import StoredTensor
from engines.models.config import LlamaConfig
from engines.models.manifest import FORMAT, Layout, rank_file, read_manifest, read_rank
from engines.models.names import TensorSpec, expected_tensors, indivisible, slice_of
from engines.models.quantized import encoding_of


def is_ranks(root: Path) -> bool:
    manifest = read_manifest(root)
    return manifest is not None and manifest.format == FORMAT


def open_ranks(root: Path, choices: Choices) -> Source:
    """Raises BadCheckpoint, UnsupportedModel."""
    manifest = read_manifest(root)
    assert manifest is not None
    if manifest.layout is None:
        raise BadCheckpoint(f"{root / 'manifest.json'}: layout: missing")
    config = LlamaConfig.parse(dict(manifest.config), str(root / "manifest.json"))
    layout = manifest.layout
    reason = indivisible(config, layout.tp)
    if reason is not None:
        raise BadCheckpoint(f"{root / 'manifest.json'}: tp {layout.tp}: {reason} cannot be shared evenly")
    encoding = encoding_of(root, layout)
    ranks = _Ranks(root, layout, config, None if encoding is None else encoding[0])
    expected = expected_tensors(config)
    tensors, problems = collect(expected.values(), ranks.unknown(expected), ranks.tensor)
    files = [rank_file(t, layout.tp, p, layout.pp) for t in range(layout.tp) for p in range(layout.pp)]
    return Source(
        root,
        "sluice",
        f"tp={layout.tp} pp={layout.pp}",
        config,
        dict(manifest.config),
        tensors,
        tuple(root / name for name in files),
        problems=problems,
        manifest=manifest,
        replicas=tuple(ranks.replicas),
    )


class _Ranks:
    """All ranks' files, opened. `small`: the dtype of quantised projections; None: they are not."""

    def __init__(self, root: Path, layout: Layout, config: LlamaConfig, small: str | None) -> None:
        self._root, self._layout, self._config, self._small = root, layout, config, small
        self._maps = MappedFiles()
        names = [rank_file(t, layout.tp, p, layout.pp) for t in range(layout.tp) for p in range(layout.pp)]
        missing = [name for name in names if not (root / name).exists()]
        if missing:
            raise absent(root, missing, f"manifest.json names {len(names)} files for ranks")
        self._headers = {
            (t, p): read_rank(root, layout, t, p) for t in range(layout.tp) for p in range(layout.pp)
        }
        self.replicas: list[tuple[LogicalTensor, LogicalTensor]] = []

    def _is_quantized(self, spec: TensorSpec) -> bool:
        return self._small is not None and spec.is_projection

    def unknown(self, expected: Mapping[str, TensorSpec]) -> list[str]:
        """A message for each tensor without a place in the model."""
        known = {*expected, *(spec.scale.name for spec in expected.values() if self._is_quantized(spec))}
        return [
            f"{stored.path}: tensor {name}: unknown: the model of manifest.json has no place for it"
            for header in self._headers.values()
            for name, stored in header.items()
            if name not in known
        ]

    def tensor(self, spec: TensorSpec) -> LogicalTensor:
        if not self._is_quantized(spec):
            return self._tensor(spec)
        return replace(self._tensor(spec, self._small), scale=self._tensor(spec.scale, "F32"))

    def _tensor(self, spec: TensorSpec, dtype: str | None = None) -> LogicalTensor:
        """`dtype`: what it must be; None: any, the same in all files."""
        stages = [p for p in range(self._layout.pp) if spec.name in self._headers[0, p]]
        if not stages:
            path = self._root / rank_file(0, self._layout.tp, 0, self._layout.pp)
            raise BadCheckpoint(f"{path}: tensor {spec.name}: missing from this rank's files")
        first, *others = [self._on_stage(spec, stage, dtype) for stage in stages]
        self.replicas += [(first, other) for other in others]
        return first

    def _on_stage(self, spec: TensorSpec, stage: int, dtype: str | None) -> LogicalTensor:
        parts: list[Part] = []
        dim = 0
        for rank in range(self._layout.tp):
            piece = slice_of(spec.rule.placement, spec.shape, self._config, rank, self._layout.tp)
            stored = self._stored(spec, rank, stage)
            wanted = list(spec.shape)
            wanted[piece.dim] = piece.length
            if stored.shape != tuple(wanted) or (dtype and stored.dtype != dtype):
                raise BadCheckpoint(
                    f"{stored.path}: tensor {spec.name}: is {stored.dtype} {list(stored.shape)}, "
                    f"the manifest makes it {dtype or stored.dtype} {wanted}"
                )
            dtype, dim = stored.dtype, piece.dim
            part = Part(piece.start, piece.stop, self._maps.tensor(spec.name, stored), stored.path)
            if not parts or parts[-1].start != part.start or parts[-1].stop != part.stop:
                parts.append(part)
            elif part.stop > part.start:
                self.replicas.append(replicas(spec.name, spec.shape, dtype, parts[-1], part))
        assert dtype is not None
        return LogicalTensor(spec.name, spec.shape, dtype, dim, tuple(parts))

    def _stored(self, spec: TensorSpec, rank: int, stage: int) -> StoredTensor:
        stored = self._headers[rank, stage].get(spec.name)
        if stored is None:
            path = self._root / rank_file(rank, self._layout.tp, stage, self._layout.pp)
            raise BadCheckpoint(f"{path}: tensor {spec.name}: missing")
        return stored
