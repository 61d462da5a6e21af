"""A rank's weights from the per-rank layout: mapped where it fits the group, else divided anew on request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.base import BadCheckpoint
from engines.models.checkpoint import DTYPES, Checkpoint, StoredTensor
from engines.models.config import LlamaConfig
from engines.models.layout import layout_of, misfit, no_fp8
from engines.models.manifest import Layout, rank_file, read_rank
from engines.models.names import Slice, TensorSpec, expected_tensors, is_on_stage, slice_of
from engines.models.quantized import ENCODINGS, encoding_of, has_fp8
from engines.runtime.cpu import unmap_pages
from engines.runtime.mesh import Mesh

_DTYPES = DTYPES | dict(ENCODINGS.values())


def open_weights(
    directory: str | Path, model: LlamaConfig, mesh: Mesh, layers: range, *, reshard: bool = False
) -> Checkpoint:
    """The checkpoint of a directory, in whichever of our formats, for the rank that holds `layers`.

    Raises BadCheckpoint, and UnsupportedModel if it is divided otherwise than the group and must not be
    divided anew; with the command that converts it.
    """
    root = Path(directory)
    layout = layout_of(root)
    if layout is None:
        return Checkpoint(root)
    _check_device(root, layout, mesh)
    if _fits(layout, mesh, layers):
        return MappedRank(root, model, layout, mesh, layers)
    if reshard:
        return ReshardingCheckpoint(root, model, layout, mesh)
    raise misfit(root, layout, mesh.tp_size, mesh.pp_size)


def _check_device(root: Path, layout: Layout, mesh: Mesh) -> None:
    """Raises UnsupportedModel: fp8 on a device that does not compute with it."""
    if layout.quantization != "fp8" or has_fp8(mesh.device):
        return
    device = "a CPU" if mesh.device.type == "cpu" else "an older one"
    raise no_fp8(root, mesh.tp_size, mesh.pp_size, device)


def _fits(layout: Layout, mesh: Mesh, layers: range) -> bool:
    is_split = (layout.tp, layout.pp) == (mesh.tp_size, mesh.pp_size)
    return is_split and tuple(layout.stages[mesh.stage]) == (layers.start, layers.stop)


class MappedRank(Checkpoint):
    """One rank's file. Nothing is sliced; tensors that lie side by side are one view of the mapping."""

    def __init__(self, root: Path, model: LlamaConfig, layout: Layout, mesh: Mesh, layers: range) -> None:
        self._model, self._layout, self._mesh, self._layers = model, layout, mesh, layers
        self._encoding = encoding_of(root, layout)
        self._path = root / rank_file(mesh.tp_rank, layout.tp, mesh.stage, layout.pp)
        super().__init__(root)
        size = self._path.stat().st_size
        self._bytes = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)

    def _locate(self) -> dict[str, StoredTensor]:
        return read_rank(self.root, self._layout, self._mesh.tp_rank, self._mesh.stage)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first tensor: a stage need not have the embedding."""
        return DTYPES[self._stored(next(iter(self.tensors), "")).dtype]

    def check(self, expected: Iterable[TensorSpec], optional: frozenset[str] = frozenset()) -> None:
        here = [self._local(spec) for spec in expected if is_on_stage(spec, self._layers, self._model)]
        small = [spec for spec in here if self._encoding is not None and spec.is_projection]
        names, scales = {spec.name for spec in small}, {spec.scale.name for spec in small}
        super().check([spec for spec in here if spec.name not in names], optional | names | scales)
        for spec in small:
            self._check_quantized(spec)

    def _check_quantized(self, spec: TensorSpec) -> None:
        assert self._encoding is not None
        for part, dtype in ((spec, self._encoding[0]), (spec.scale, "F32")):
            stored = self.tensors.get(part.name)
            if stored is None or (stored.dtype, stored.shape) != (dtype, part.shape):
                found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                raise BadCheckpoint(
                    f"{self._path}: tensor {part.name}: is {found}, not {dtype} {list(part.shape)}"
                )

    def _local(self, spec: TensorSpec) -> TensorSpec:
        """The shape that this rank holds."""
        part = slice_of(spec.rule.placement, spec.shape, self._model, self._mesh.tp_rank, self._layout.tp)
        shape = list(spec.shape)
        shape[part.dim] = part.length
        return TensorSpec(spec.name, spec.rule, tuple(shape), spec.layer)

    def quantized(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        if self._encoding is None or f"{names[0]}_scale" not in self.tensors:
            return None
        pair = [(names, self._encoding[1]), ([f"{name}_scale" for name in names], torch.float32)]
        weight, scale = (self._joined(these, dtype) for these, dtype in pair)
        return weight, scale

    def _joined(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        joined = self.mapped(names, dtype)
        if joined is not None:
            return joined
        return torch.cat(
            [self._bytes_of(name).clone().view(dtype).view(self.tensors[name].shape) for name in names]
        )

    def _bytes_of(self, name: str) -> Tensor:
        stored = self.tensors[name]
        return self._bytes[stored.offset : stored.offset + stored.num_bytes]

    def mapped(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        stored = [self.tensors[name] for name in names]
        first = stored[0]
        ends = [s.offset + s.num_bytes for s in stored]
        side_by_side = all(s.offset == end for s, end in zip(stored[1:], ends[:-1], strict=True))
        if (
            not side_by_side
            or any(_DTYPES.get(s.dtype) != dtype for s in stored)
            or first.offset % dtype.itemsize
        ):
            return None
        shape = (sum(s.shape[0] for s in stored), *first.shape[1:])
        num_bytes = sum(s.num_bytes for s in stored)
        return self._bytes[first.offset : first.offset + num_bytes].view(dtype).view(shape)

    def let_go(self, weight: Tensor) -> None:
        if weight.untyped_storage().data_ptr() == self._bytes.untyped_storage().data_ptr():
            unmap_pages(weight)

    def read_into(self, out: Tensor, name: str, part: Slice) -> None:
        """All of what this rank holds, padding included: `part` is what that is of the whole tensor."""
        whole = self.mapped((name,), _DTYPES[self.tensors[name].dtype])
        if whole is None:
            stored = self.tensors[name]
            super().read_into(out, name, Slice(0, 0, stored.shape[0]))
        else:
            out.copy_(whole)


class ReshardingCheckpoint(Checkpoint):
    """All ranks' files as one checkpoint: slices are put together from those of the layout."""

    def __init__(self, root: Path, model: LlamaConfig, layout: Layout, mesh: Mesh) -> None:
        self._model, self._layout, self._mesh = model, layout, mesh
        self._encoding = encoding_of(root, layout)
        self._specs = expected_tensors(model)
        if self._encoding is not None:
            scales = [spec.scale for spec in self._specs.values() if spec.is_projection]
            self._specs |= {scale.name: scale for scale in scales}
        super().__init__(root)

    def _locate(self) -> dict[str, StoredTensor]:
        """Every tensor under its global shape; where it lies is found when it is read."""
        self._ranks = [self._files_of(rank) for rank in range(self._layout.tp)]
        tensors = {}
        for name, stored in self._ranks[0].items():
            spec = self._specs.get(name)
            shape = spec.shape if spec is not None else stored.shape
            tensors[name] = replace(stored, shape=shape)
        return tensors

    def check(self, expected: Iterable[TensorSpec], optional: frozenset[str] = frozenset()) -> None:
        """As for other checkpoints; quantised projections must have their dtype, and scales."""
        wanted = list(expected)
        small = [spec for spec in wanted if self._encoding is not None and spec.is_projection]
        known = {spec.name for spec in small} | {spec.scale.name for spec in small}
        super().check([spec for spec in wanted if spec.name not in known], optional | known)
        super().check([spec.scale for spec in small], optional | self.tensors.keys())
        for spec in small:
            assert self._encoding is not None
            stored = self.tensors.get(spec.name)
            if stored is None or stored.dtype != self._encoding[0]:
                found = "missing" if stored is None else stored.dtype
                raise BadCheckpoint(f"{self.root}: tensor {spec.name}: is {found}, not {self._encoding[0]}")

    def quantized(self, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        if self._encoding is None or not self._specs[names[0]].is_projection:
            return None
        specs = [self._specs[name] for name in names]
        weights = [self._local(spec, self._encoding[1]) for spec in specs]
        return torch.cat(weights), torch.cat([self._local(spec.scale, torch.float32) for spec in specs])

    def _local(self, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
        """What the rank of this group holds of a tensor."""
        part = slice_of(spec.rule.placement, spec.shape, self._model, self._mesh.tp_rank, self._mesh.tp_size)
        shape = list(spec.shape)
        shape[part.dim] = part.length
        out = torch.empty(shape, dtype=dtype)
        self.read_into(out, spec.name, part)
        return out

    def _files_of(self, rank: int) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for stage in range(self._layout.pp):
            found = {**read_rank(self.root, self._layout, rank, stage), **found}
        return found

    def read_into(self, out: Tensor, name: str, part: Slice) -> None:
        length = part.stop - part.start
        out.narrow(part.dim, length, out.shape[part.dim] - length).zero_()
        for path, theirs in self._pieces(name):
            start, stop = max(part.start, theirs.start), min(part.stop, theirs.stop)
            if start < stop:
                ours = out.narrow(part.dim, start - part.start, stop - start)
                self._copy(ours, name, path, part.dim, start - theirs.start, stop - theirs.start)

    def _pieces(self, name: str) -> Iterator[tuple[Path, Slice]]:
        """What each rank's file holds of a tensor, replicas once."""
        spec, last = self._specs[name], None
        for rank, tensors in enumerate(self._ranks):
            piece = slice_of(spec.rule.placement, spec.shape, self._model, rank, self._layout.tp)
            if name not in tensors:
                raise BadCheckpoint(f"{self.root}: tensor {name}: missing from the files of rank {rank}")
            if piece != last:
                yield tensors[name].path, piece
            last = piece

    def _copy(self, out: Tensor, name: str, path: Path, dim: int, start: int, stop: int) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                view = file.get_slice(name)
                out.copy_(view[:, start:stop] if dim == 1 else view[start:stop])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BadCheckpoint(f"{path}: tensor {name}: cannot be read: {error}") from error
