"""Opens Meta's checkpoints: consolidated.NN.pth for each model-parallel rank, and params.json."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from conversion.params import Measured, Params, num_shards, to_config
from conversion.pickled import read_pickled
from conversion.problems import absent, collect
from conversion.source import Choices, Json, Source
from conversion.tensors import TORCH_DTYPES, Bytes, LogicalTensor, Part, replicas
from engines.base import BadCheckpoint
from engines.modeldir import BadModelDir
from engines.models.checkpoint import StoredTensor
from engines.models.config import LlamaConfig
from engines.models.manifest import Manifest, read_manifest
from engines.models.names import IGNORED_SUFFIXES, Placement, TensorSpec, expected_tensors

_SHARD = re.compile(r"consolidated(?:\.(\d+))?\.pth")
_BIASES = {"attention_bias": "layers.0.attention.wq.bias", "mlp_bias": "layers.0.feed_forward.w1.bias"}

Shard = dict[str, tuple[StoredTensor, Bytes]]


def is_meta(root: Path) -> bool:
    return any(_SHARD.fullmatch(path.name) for path in root.glob("consolidated*"))


def open_meta(root: Path, choices: Choices) -> Source:
    """Raises BadCheckpoint, BadModelDir, UnsupportedModel, CannotConvert."""
    manifest = read_manifest(root)
    paths = _shard_paths(root, manifest)
    shards = _Shards(paths, [read_pickled(path) for path in paths])
    shards.check_distinct()
    config_json, notes = _config(root, shards, manifest, choices)
    config = LlamaConfig.parse(config_json, str(root / "params.json"))
    stated = manifest is not None and manifest.layout is not None
    if not stated and "output.weight" in shards.content[0]:
        tied = _is_tied(shards, config)
        config_json["tie_word_embeddings"] = tied
        config = LlamaConfig.parse(config_json, str(root / "params.json"))
        if tied:
            notes.append("output.weight equals tok_embeddings.weight: converted as tied")
    expected = expected_tensors(config)
    known = {spec.meta_name for spec in expected.values()}
    copies = {"output.weight"} if config.tie_word_embeddings else set[str]()
    unknown = [] if choices.allow_extra else shards.unknown(known)
    tensors, problems = collect(expected.values(), unknown, lambda spec: shards.tensor(spec, config))
    return Source(
        root,
        "meta",
        f"{len(paths)} consolidated shard(s)",
        config,
        config_json,
        tensors,
        tuple(paths),
        ignored=tuple(sorted({name for content in shards.content for name in content} - known - copies)),
        notes=tuple(notes),
        problems=problems,
        manifest=manifest,
        replicas=tuple(shards.replicas),
    )


def _shard_paths(root: Path, manifest: Manifest | None) -> list[Path]:
    """consolidated.00.pth and so on, none missing as far as manifest.json or else params.json tell."""
    found: dict[int, Path] = {}
    for path in sorted(root.glob("consolidated*")):
        match = _SHARD.fullmatch(path.name)
        number = int(match[1] or 0) if match else -1
        if number in found:
            raise BadCheckpoint(f"{path}: duplicate: {found[number].name} is shard {number} too")
        if match:
            found[number] = path
    stated = _num_written(manifest) if manifest is not None else _num_by_sizes(root, min(found.items())[1])
    num = max(stated, max(found) + 1)
    missing = [f"consolidated.{number:02}.pth" for number in range(num) if number not in found]
    if missing:
        raise absent(root, missing, f"the model is in {num} shards, 00 to {num - 1:02}")
    return [found[number] for number in sorted(found)]


def _num_written(manifest: Manifest) -> int:
    return sum(_SHARD.fullmatch(name) is not None for name in manifest.files)


def _num_by_sizes(root: Path, shard: Path) -> int:
    """How many shards like this one make up the model of params.json; 0: it does not tell."""
    if not (root / "params.json").is_file():
        return 0
    rows = {name: stored.shape[0] for name, (stored, _) in read_pickled(shard).items() if stored.shape}
    return num_shards(Params.load(root / "params.json"), rows)


def _config(
    root: Path, shards: _Shards, manifest: Manifest | None, choices: Choices
) -> tuple[Json, list[str]]:
    if not (root / "params.json").exists():
        raise BadModelDir(_without_params(root))
    params = Params.load(root / "params.json")
    if manifest is None or manifest.layout is None:
        config, notes = to_config(params, shards.measure(params), choices)
        config.update({key: True for key, name in _BIASES.items() if name in shards.content[0]})
        return config, notes
    config = dict(manifest.config)
    for key, mine in (
        ("dim", "hidden_size"),
        ("n_layers", "num_hidden_layers"),
        ("n_heads", "num_attention_heads"),
    ):
        if params.count(key) != config.get(mine):
            raise BadCheckpoint(
                f"{params.path}: {key} ({params.count(key)}): manifest.json's {mine} is {config.get(mine)}"
            )
    return config, []


def _without_params(root: Path) -> str:
    tokenizer = "" if (root / "tokenizer.model").exists() else ", and tokenizer.model with it"
    return (
        f"{root / 'params.json'}: missing: the sizes of the model are in it: copy or download it{tokenizer}, "
        "from where consolidated.*.pth are from"
    )


def _is_tied(shards: _Shards, config: LlamaConfig) -> bool:
    specs = expected_tensors(config)
    try:
        head = shards.tensor(specs["lm_head.weight"], config)
        embedding = shards.tensor(specs["model.embed_tokens.weight"], config)
    except BadCheckpoint:
        return False  # what is wrong with them is told with all other tensors
    if head.dtype != embedding.dtype:
        return False
    step = max(1, (1 << 20) // max(1, head.num_columns))
    for start in range(0, head.num_rows, step):
        rows = np.arange(start, min(start + step, head.num_rows))
        if not np.array_equal(head.read(rows), embedding.read(rows)):
            return False
    return True


@dataclass
class _Shards:
    """The shards side by side. `replicas` collects what several of them hold, for a check of equality."""

    paths: list[Path]
    content: list[Shard]
    replicas: list[tuple[LogicalTensor, LogicalTensor]] = field(default_factory=list)

    @property
    def num(self) -> int:
        return len(self.paths)

    def measure(self, params: Params) -> Measured:
        """Sizes over all shards."""
        hidden = self.shape("norm.weight")[0]
        rows, columns = self.shape("tok_embeddings.weight")
        heads, kv_heads = params.count("n_heads"), params.count("n_kv_heads", params.count("n_heads"))
        query = self.shape("layers.0.attention.wq.weight")[0] * self.num
        key = self.shape("layers.0.attention.wk.weight")[0]
        is_replicated = kv_heads < self.num and key * heads == query
        return Measured(
            vocab=rows if columns * self.num == hidden and self.num > 1 else rows * self.num,
            hidden=hidden,
            query=query,
            key=key * kv_heads if is_replicated else key * self.num,
            ffn=self.shape("layers.0.feed_forward.w1.weight")[0] * self.num,
            dtype=str(TORCH_DTYPES[self._get(0, "tok_embeddings.weight")[0].dtype]).removeprefix("torch."),
        )

    def check_distinct(self) -> None:
        """No two shards hold the same query heads: one would be a copy under another's name."""
        seen: dict[bytes, Path] = {}
        for shard, path in enumerate(self.paths):
            if "layers.0.attention.wq.weight" not in self.content[shard]:
                continue
            _, data = self.content[shard]["layers.0.attention.wq.weight"]
            start = data[:64].tobytes()
            if start in seen:
                raise BadCheckpoint(f"{path}: duplicate: holds the same weights as {seen[start].name}")
            seen[start] = path

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the first shard, and of most of its layers; a matrix unless it is the norm or a bias."""
        alike = [other for other in self.content[0] if other.endswith(name.removeprefix("layers.0."))]
        shapes = Counter(self._get(0, other)[0].shape for other in alike or [name])
        shape = shapes.most_common(1)[0][0]
        if len(shape) != 1 + (not name.endswith(("norm.weight", "bias"))):
            raise BadCheckpoint(f"{self.paths[0]}: tensor {name}: has the shape {list(shape)}")
        return shape

    def _get(self, shard: int, name: str) -> tuple[StoredTensor, Bytes]:
        if name not in self.content[shard]:
            raise BadCheckpoint(f"{self.paths[shard]}: tensor {name}: missing")
        return self.content[shard][name]

    def unknown(self, known: set[str]) -> list[str]:
        """A message for each tensor without a place in the model. A tied model's output may be there."""
        return [
            f"{path}: tensor {name}: unknown: a Llama of params.json has no place for it; "
            "--allow-extra leaves it out"
            for path, content in zip(self.paths, self.content, strict=True)
            for name in content
            if name not in known | {"output.weight"} and not name.endswith(IGNORED_SUFFIXES)
        ]

    def tensor(self, spec: TensorSpec, config: LlamaConfig) -> LogicalTensor:
        """All shards of one tensor. Raises BadCheckpoint if their shapes do not make it up."""
        pieces = [self._get(shard, spec.meta_name) for shard in range(self.num)]
        dim, starts = self._division(spec, pieces, config)
        dtypes = {stored.dtype for stored, _ in pieces}
        if len(dtypes) > 1:
            raise BadCheckpoint(
                f"{self.paths[0]}: tensor {spec.meta_name}: is {sorted(dtypes)} over the shards"
            )
        parts: list[Part] = []
        head_dim = config.head_dim if spec.rule.is_rotated else 0
        for (stored, data), start in zip(pieces, starts, strict=True):
            part = Part(start, start + stored.shape[dim], data, stored.path)
            if parts and parts[-1].start == start:
                self.replicas.append(replicas(spec.meta_name, spec.shape, stored.dtype, parts[-1], part))
            else:
                parts.append(part)
        return LogicalTensor(spec.name, spec.shape, pieces[0][0].dtype, dim, tuple(parts), head_dim)

    def _division(
        self, spec: TensorSpec, pieces: list[tuple[StoredTensor, Bytes]], config: LlamaConfig
    ) -> tuple[int, list[int]]:
        """The split dimension, and where each shard's piece starts in it; decided from the shapes."""
        shapes = [stored.shape for stored, _ in pieces]
        for dim, starts, size in self._candidates(spec, config):
            wanted = list(spec.shape)
            wanted[dim] = size
            padded = spec.rule.placement is Placement.VOCAB and dim == 0
            if all(s == tuple(wanted) for s in shapes) or (padded and _covers(shapes, spec.shape)):
                if padded:
                    starts = [shard * shapes[0][0] for shard in range(self.num)]
                return dim, starts
        shard = next((i for i, s in enumerate(shapes) if s != shapes[0]), 0)
        raise BadCheckpoint(
            f"{self.paths[shard]}: tensor {spec.meta_name}: its shape is {list(shapes[shard])}; "
            f"no split of {list(spec.shape)} over {self.num} shards gives that"
        )

    def _candidates(self, spec: TensorSpec, config: LlamaConfig) -> list[tuple[int, list[int], int]]:
        """(dim, starts, size of a shard) of every way in which Meta splits such a tensor."""
        rows, n = spec.shape[0], self.num
        even = (0, [i * (rows // n) for i in range(n)], rows // n)
        match spec.rule.placement:
            case Placement.REPLICATED:
                return [(0, [0] * n, rows)]
            case Placement.COLUMN:
                return [even]
            case Placement.KV_COLUMN if config.num_kv_heads < n:
                heads = [i * config.num_kv_heads // n * config.head_dim for i in range(n)]
                return [(0, heads, config.head_dim)]
            case Placement.KV_COLUMN:
                return [even]
            case Placement.ROW:
                columns = spec.shape[1] // n
                return [(1, [i * columns for i in range(n)], columns)]
            case Placement.VOCAB:
                columns = spec.shape[1] // n
                by_columns = (1, [i * columns for i in range(n)], columns)
                return [even, by_columns] if n > 1 else [even]
        return []


def _covers(shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether equal shards of rows hold all of the tensor and less than one more row each."""
    rows = shapes[0][0]
    return all(s == (rows, *shape[1:]) for s in shapes) and rows == -(-shape[0] // len(shapes))
