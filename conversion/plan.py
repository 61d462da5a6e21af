"""What will be written: every file, and every tensor in it as a piece of a logical one. Pure: no weight
is read for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from conversion.quantize import Encoding
from conversion.source import Format, Source
from conversion.tensors import CannotConvert, LogicalTensor, itemsize
from engines.config import StageSplit
from engines.models.config import LlamaConfig
from engines.models.manifest import Layout, rank_file
from engines.models.names import (
    Placement,
    Slice,
    TensorSpec,
    expected_tensors,
    indivisible,
    is_on_stage,
    slice_of,
)
from engines.models.stages import BadSplit, sizes_of, split_layers


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: `part` of `tensor`, its other dimension whole. `meta_head_dim` as there, for
    the order that is written."""

    name: str
    tensor: LogicalTensor
    part: Slice
    dtype: str
    encoding: Encoding = Encoding.PLAIN
    meta_head_dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        shape[self.part.dim] = self.part.length
        if self.encoding.is_scale:
            shape = shape[:1]
        return tuple(shape)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of weights. `name` is relative to the target directory."""

    name: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Target:
    """What to make."""

    format: Format
    shards: int = 1  # of Meta's format
    tp: int = 1
    pp: int = 1
    dtype: str | None = None  # safetensors' name; None: each tensor's own
    embedding_by_rows: bool | None = None  # Meta's Llama 3 splits the vocabulary, 1 and 2 the columns
    max_file_bytes: int = 5 << 30  # of Hugging Face's format
    quantize: Literal["int8", "fp8"] | None = None
    stage_split: StageSplit = "work"  # as in engines/models/stages.py
    tokenizer: str | None = None  # a tokenizer.model that lies elsewhere


@dataclass(frozen=True, slots=True)
class Plan:
    """All files of weights, and the layout that goes into the manifest."""

    files: tuple[OutputFile, ...]
    layout: Layout | None
    target: Target

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def make_plan(source: Source, target: Target) -> Plan:
    """Raises CannotConvert: the model cannot be divided like that."""
    _check_quantization(source, target)
    match target.format:
        case "hf":
            return Plan(tuple(_hf_files(source, target)), None, target)
        case "meta":
            return _meta_plan(source, target)
        case "sluice":
            return _rank_plan(source, target)


def _check_quantization(source: Source, target: Target) -> None:
    if target.quantize is not None and target.format != "sluice":
        raise CannotConvert("--quantize: only --to sluice has a place for scales")
    there = source.quantization
    if there is None:
        return
    if target.quantize not in (None, there):
        raise CannotConvert(
            f"--quantize {target.quantize}: {source.root} is quantised ({there}) already, and would lose "
            "more: quantise what it was made of"
        )
    if target.format != "sluice" and target.dtype is None:
        raise CannotConvert(
            f"{source.root}: is quantised ({there}), which --to {target.format} has no place for: "
            "--dtype bfloat16 writes the values that it stands for"
        )


def _keeps_quantized(source: Source, target: Target) -> bool:
    """Whether quantised tensors are taken over as they are, their scales with them."""
    asked = target.quantize is not None or target.dtype is None
    return target.format == "sluice" and source.quantization is not None and asked


def _whole(spec: TensorSpec) -> Slice:
    return Slice(0, 0, spec.shape[0])


def _dtype(tensor: LogicalTensor, target: Target) -> str:
    return target.dtype or tensor.dtype


def _hf_files(source: Source, target: Target) -> Iterator[OutputFile]:
    entries = [
        Entry(spec.name, tensor := source.tensors[spec.name], _whole(spec), _dtype(tensor, target))
        for spec in expected_tensors(source.config).values()
    ]
    groups = list(_filled(entries, target.max_file_bytes))
    for number, group in enumerate(groups, 1):
        name = (
            f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        )
        yield OutputFile(name, tuple(group), {"format": "pt"})


def _filled(entries: list[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.num_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.num_bytes
    yield group


def _check_divisible(config: LlamaConfig, parts: int, option: str) -> None:
    reason = indivisible(config, parts)
    if reason is not None:
        raise CannotConvert(
            f"{option} {parts}: {reason} cannot be shared evenly: choose a number that divides them"
        )


def _meta_plan(source: Source, target: Target) -> Plan:
    config, shards = source.config, target.shards
    _check_divisible(config, shards, "--shards")
    by_rows = target.embedding_by_rows
    if by_rows is None:
        is_even = config.hidden_size % shards == config.vocab_size % shards == 0
        by_rows = config.vocab_size >= 128000 or not is_even
    if not by_rows and config.hidden_size % shards:
        raise CannotConvert(f"--embedding columns: {config.hidden_size} columns over {shards} shards")
    if not by_rows and config.vocab_size % shards:
        raise CannotConvert(
            f"--embedding columns: the head's {config.vocab_size} rows over {shards} shards are padded, and "
            "the embedding must have as many: choose rows"
        )
    files = []
    for shard in range(shards):
        entries = [
            _meta_entry(source, spec, target, shard, by_rows) for spec in expected_tensors(config).values()
        ]
        if config.tie_word_embeddings:
            entries.append(_tied_output(source, target, shard))
        files.append(OutputFile(f"consolidated.{shard:02}.pth", tuple(entries), {}))
    layout = _layout(source, shards, [range(config.num_layers)], None)
    return Plan(tuple(files), layout, target)


def _meta_entry(source: Source, spec: TensorSpec, target: Target, shard: int, by_rows: bool) -> Entry:
    tensor = source.tensors[spec.name]
    part = slice_of(spec.rule.placement, spec.shape, source.config, shard, target.shards)
    if spec.meta_name == "tok_embeddings.weight" and not by_rows:
        part = slice_of(Placement.ROW, spec.shape, source.config, shard, target.shards)
    head_dim = source.config.head_dim if spec.rule.is_rotated else 0
    return Entry(spec.meta_name, tensor, part, _dtype(tensor, target), meta_head_dim=head_dim)


def _tied_output(source: Source, target: Target, shard: int) -> Entry:
    """Meta stores the head of a tied model beside its embedding."""
    tensor = source.tensors["model.embed_tokens.weight"]
    part = slice_of(Placement.VOCAB, tensor.shape, source.config, shard, target.shards)
    return Entry("output.weight", tensor, part, _dtype(tensor, target))


def _rank_plan(source: Source, target: Target) -> Plan:
    config, tp, pp = source.config, target.tp, target.pp
    _check_divisible(config, tp, "--tp")
    try:
        stages = split_layers(sizes_of(config), pp, target.stage_split)
    except BadSplit as error:
        raise CannotConvert(f"--pp {pp}: {error}") from None
    files = []
    for tp_rank in range(tp):
        for stage, layers in enumerate(stages):
            specs = [s for s in expected_tensors(config).values() if is_on_stage(s, layers, config)]
            pairs = [(s, entry) for s in specs for entry in _rank_entries(source, s, target, tp_rank)]
            entries = [entry for _, entry in sorted(pairs, key=_file_order)]
            name = rank_file(tp_rank, tp, stage, pp)
            files.append(OutputFile(name, tuple(entries), {"format": "pt", "sluice_rank": name}))
    quantization = source.quantization if _keeps_quantized(source, target) else target.quantize
    return Plan(tuple(files), _layout(source, tp, stages, quantization), target)


def _file_order(pair: tuple[TensorSpec, Entry]) -> tuple[int, int]:
    """Weights of a layer, then its biases, then its scales: what an engine fuses lies side by side."""
    spec, entry = pair
    return spec.layer or 0, 2 * entry.name.endswith("_scale") + entry.name.endswith("bias")


def _rank_entries(source: Source, spec: TensorSpec, target: Target, rank: int) -> Iterator[Entry]:
    tensor = source.tensors[spec.name]
    part = slice_of(spec.rule.placement, spec.shape, source.config, rank, target.tp)
    keep = _keeps_quantized(source, target)
    if not spec.is_projection or (target.quantize is None and not keep):
        yield Entry(spec.name, tensor, part, _dtype(tensor, target))
        return
    of_scale = slice_of(spec.scale.rule.placement, spec.scale.shape, source.config, rank, target.tp)
    if keep:
        assert tensor.scale is not None
        yield Entry(spec.name, tensor, part, tensor.dtype)
        yield Entry(spec.scale.name, tensor.scale, of_scale, "F32")
        return
    assert target.quantize is not None
    encoding = Encoding(target.quantize)
    yield Entry(spec.name, tensor, part, encoding.dtype, encoding)
    yield Entry(spec.scale.name, tensor, of_scale, "F32", encoding.scale)


def _layout(source: Source, tp: int, stages: list[range], quantization: str | None) -> Layout:
    config = source.config
    return Layout(
        tp=tp,
        pp=len(stages),
        stages=[(layers.start, layers.stop) for layers in stages],
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // tp) * tp,
        kv_replicas=max(1, tp // config.num_kv_heads),
        is_tied=config.tie_word_embeddings,
        quantization=quantization,
    )
