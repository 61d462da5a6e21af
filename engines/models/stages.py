"""Which layers each stage of a pipeline holds. Torch-free; no weight is read for it.

A stage holds consecutive layers; the first one holds the embedding too, the last one norm and head. A
tied embedding is on both. Three ways to cut:

- `work` (the default): equal time of a step. That of head and layers goes by the weights that it reads, a
  layer's attention and the small operations between count as half of its weights again; the embedding
  counts as nothing, for a step looks up a few of its rows.
- `bytes`: equal memory. Both count whole.
- `layers`: equal numbers of layers, whatever else the first and the last stage hold.

Or the number of layers of each stage, given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from operator import add
from typing import TYPE_CHECKING

from engines.models.names import expected_tensors

if TYPE_CHECKING:
    from engines.config import StageSplit
    from engines.models.config import LlamaConfig


class BadSplit(ValueError):  # noqa: N818
    """These layers cannot be divided like that. The message has the remedy."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Weights, counted in elements. `head`: what the last stage holds beside its layers, norm included;
    a tied head counts as the embedding that it is."""

    embedding: int
    layers: tuple[int, ...]
    head: int


def sizes_of(config: LlamaConfig) -> Sizes:
    embedding, head, layer = 0, 0, 0
    for spec in expected_tensors(config).values():
        count = prod(spec.shape)
        if spec.rule.is_per_layer:
            layer += count
        elif spec.name == "model.embed_tokens.weight":
            embedding = count
        else:
            head += count
    if config.tie_word_embeddings:
        head += embedding
    return Sizes(embedding, (layer // config.num_layers,) * config.num_layers, head)


def sizes_by_name(
    shapes: Mapping[str, tuple[int, ...]], layer_prefix: str, num_layers: int, embedding: str, is_tied: bool
) -> Sizes:
    """Of a model whose layers' weights are named `layer_prefix` + number + "." and more."""
    layers = [0] * num_layers
    rest = 0
    for name, shape in shapes.items():
        number = name.removeprefix(layer_prefix).partition(".")[0] if name.startswith(layer_prefix) else ""
        if number.isdecimal() and int(number) < num_layers:
            layers[int(number)] += prod(shape)
        elif name != embedding:
            rest += prod(shape)
    size = prod(shapes[embedding])
    return Sizes(size, tuple(layers), rest + size * is_tied)


def split_layers(sizes: Sizes, num_stages: int, how: StageSplit = "work") -> list[range]:
    """The layers of each stage in order, at least one each. Raises BadSplit."""
    num_layers = len(sizes.layers)
    if num_stages > num_layers:
        raise BadSplit(
            f"a pipeline of {num_stages} stages needs as many layers, and the model has {num_layers}: "
            f"set pipelineParallel (parallelLevel, nproc-per-node) to {num_layers} or less"
        )
    if how == "work":
        return _balanced([3 * size for size in sizes.layers], 0, 2 * sizes.head, num_stages)
    if how == "bytes":
        return _balanced(sizes.layers, sizes.embedding, sizes.head, num_stages)
    counts = _even(num_layers, num_stages) if how == "layers" else _checked(how, num_layers, num_stages)
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _even(num_layers: int, num_stages: int) -> list[int]:
    """Earlier stages take what is left over: the last one has the head."""
    share, rest = divmod(num_layers, num_stages)
    return [share + (stage < rest) for stage in range(num_stages)]


def _checked(counts: tuple[int, ...], num_layers: int, num_stages: int) -> list[int]:
    stated = ", ".join(map(str, counts))
    if len(counts) != num_stages:
        raise BadSplit(
            f"stageSplit [{stated}] is for {len(counts)} stages, and the group has {num_stages}: "
            f"give {num_stages} numbers, or remove stageSplit"
        )
    if sum(counts) != num_layers or min(counts) < 1:
        raise BadSplit(
            f"stageSplit [{stated}] adds to {sum(counts)}, and the model has {num_layers} layers: "
            f"give {num_stages} numbers of 1 or more that add to {num_layers}, or remove stageSplit"
        )
    return list(counts)


def _balanced(layers: Sequence[int], first: int, last: int, num_stages: int) -> list[range]:
    """The cut whose largest stage is smallest, and among those the one with the most even stages."""
    ends = [0, *accumulate(layers)]

    def cost(stage: int, start: int, stop: int) -> int:
        return ends[stop] - ends[start] + first * (stage == 0) + last * (stage == num_stages - 1)

    def evenness(stage: int, start: int, stop: int) -> int:
        """Beyond what any stage must take at least, worse than any unevenness."""
        size = cost(stage, start, stop)
        return size * size if size <= largest else _NEVER

    largest, _ = _cheapest(len(layers), num_stages, cost, max)
    return _cheapest(len(layers), num_stages, evenness, add)[1]


_NEVER = 1 << 200


def _cheapest(
    num_layers: int, num_stages: int, cost: Callable[[int, int, int], int], join: Callable[[int, int], int]
) -> tuple[int, list[range]]:
    """The cut with the least cost, that of its stages joined by `join`. cost(stage, start, stop)."""

    @cache
    def rest(stage: int, start: int) -> tuple[int, int]:
        """The least cost of the stages from this one on, and where this one stops."""
        if stage == num_stages - 1:
            return cost(stage, start, num_layers), num_layers
        stops = range(start + 1, num_layers - (num_stages - stage - 1) + 1)
        return min((join(cost(stage, start, stop), rest(stage + 1, stop)[0]), stop) for stop in stops)

    cut, start = [], 0
    for stage in range(num_stages):
        stop = rest(stage, start)[1]
        cut.append(range(start, stop))
        start = stop
    return rest(0, 0)[0], cut
