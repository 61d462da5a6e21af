"""Random small models, and conversions of them in this process."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from conversion.job import Options, run
from conversion.open import open_checkpoint
from conversion.plan import Target, make_plan
from conversion.progress import Progress, Silent
from conversion.source import Choices
from engines.models.manifest import Manifest
from tests.models import LLAMA3_SCALING, ODD, Shape

META_SCALING = {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}
"""What Meta's params.json can say."""

ODD_FOR_META = replace(ODD, extra={**ODD.extra, "rope_scaling": META_SCALING})


@dataclass(frozen=True)
class Case:
    """A model, and the layouts that it is taken through."""

    shape: Shape
    dtype: torch.dtype
    targets: tuple[Target, ...]


def random_case(seed: int) -> Case:
    """MHA, GQA or MQA; tied, biased, padded, with odd head_dims; N, M and pp of 1, 2, 3, 4, 8."""
    rng = random.Random(seed)
    splits = [rng.choice((1, 2, 3, 4, 8)) for _ in range(2)]
    stages = rng.choice((1, 2, 3, 4, 8))
    heads, kv_heads = _heads(rng, splits)
    head_dim = rng.choice((4, 6, 8))
    biased = rng.random() < 0.3
    extra: dict[str, Any] = {"attention_bias": biased, "mlp_bias": biased and rng.random() < 0.5}
    if rng.random() < 0.3:
        extra["rope_scaling"] = META_SCALING
    shape = Shape(
        hidden=rng.choice((24, 48)),
        layers=max(stages, rng.randint(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=24 * rng.choice((1, 2)),
        vocab=rng.choice((24, 29, 40, 51)),
        tied=rng.random() < 0.4,
        max_positions=128,
        extra=extra,
    )
    targets = [
        Target("meta", shards=splits[0], embedding_by_rows=rng.choice((None, True))),
        Target("sluice", tp=splits[1], pp=stages),
        Target("meta", shards=splits[1], embedding_by_rows=rng.choice((None, True))),
        Target("sluice", tp=splits[0], pp=rng.choice((1, stages))),
        Target("hf", max_file_bytes=rng.choice((1 << 10, 1 << 30))),
    ]
    rng.shuffle(targets)
    dtype = rng.choice((torch.bfloat16, torch.float32, torch.float16))
    return Case(shape, dtype, (*targets, Target("hf")))


def _heads(rng: random.Random, splits: list[int]) -> tuple[int, int]:
    """Heads that all splits divide, key/value heads that divide or are divided."""
    pairs = [
        (heads, kv_heads)
        for heads in (1, 2, 3, 4, 6, 8, 12, 24)
        for kv_heads in (1, 2, 3, 4, 6, 8, 24)
        if heads % kv_heads == 0
        and all(heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0) for n in splits)
    ]
    return rng.choice(pairs)


def convert(
    source: Path,
    target: Path,
    how: Target,
    options: Options | None = None,
    choices: Choices | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """As `sluice convert`."""
    opened = open_checkpoint(source, choices)
    plan = make_plan(opened, how)
    return run(opened, plan, target, options or Options(jobs=2), progress or Silent())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of a Hugging Face directory with one file."""
    return load_file(directory / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name
