"""How layers are divided over stages: by work, by bytes, by count, by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.models.config import LlamaConfig
from engines.models.names import expected_tensors
from engines.models.stages import BadSplit, Sizes, sizes_of, split_layers
from tests.models import ODD, SMALL, Shape

EQUAL = Sizes(embedding=0, layers=(1,) * 12, head=0)


def llama(shape: Shape) -> LlamaConfig:
    return LlamaConfig.parse(shape.config_json(torch.float32), "config.json")


def counts(sizes: Sizes, num_stages: int, how: str | tuple[int, ...]) -> list[int]:
    return [len(layers) for layers in split_layers(sizes, num_stages, how)]  # type: ignore[arg-type]


def test_by_count_the_earlier_stages_take_what_is_left_over() -> None:
    assert counts(EQUAL, 5, "layers") == [3, 3, 2, 2, 2]


def test_by_work_a_layer_counts_half_as_much_again_and_the_embedding_nothing() -> None:
    sizes = Sizes(embedding=100, layers=(10,) * 12, head=60)
    assert counts(sizes, 2, "work") == [8, 4]


def test_by_bytes_both_count() -> None:
    sizes = Sizes(embedding=40, layers=(10,) * 12, head=20)
    assert counts(sizes, 2, "bytes") == [5, 7]


def test_by_hand() -> None:
    assert split_layers(EQUAL, 3, (1, 4, 7)) == [range(1), range(1, 5), range(5, 12)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ((6, 6), r"\[6, 6\] is for 2 stages, and the group has 3: give 3 numbers"),
        ((4, 4, 5), r"adds to 13, and the model has 12 layers: give 3 numbers of 1 or more that add to 12"),
        ((0, 6, 6), r"give 3 numbers of 1 or more"),
    ],
)
def test_wrong_numbers_are_refused(how: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadSplit, match=message):
        split_layers(EQUAL, 3, how)


def test_more_stages_than_layers_are_refused_with_the_remedy() -> None:
    with pytest.raises(BadSplit, match="13 stages needs as many layers, and the model has 12: set pipeline"):
        split_layers(EQUAL, 13)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9),
    st.integers(0, 90),
    st.integers(0, 90),
    st.integers(1, 9),
)
def test_no_other_cut_has_a_smaller_largest_stage(
    layers: list[int], embedding: int, head: int, num_stages: int
) -> None:
    num_stages = min(num_stages, len(layers))
    found = split_layers(Sizes(embedding, tuple(layers), head), num_stages, "bytes")
    assert [layer for stage in found for layer in stage] == list(range(len(layers)))
    assert all(found)

    def largest(cut: list[range]) -> int:
        sums = [sum(layers[layer] for layer in stage) for stage in cut]
        sums[0] += embedding
        sums[-1] += head
        return max(sums)

    others = combinations(range(1, len(layers)), num_stages - 1)
    cuts = [[range(a, b) for a, b in zip((0, *o), (*o, len(layers)), strict=True)] for o in others]
    assert largest(found) == min(map(largest, cuts))


@pytest.mark.parametrize("shape", [SMALL, ODD], ids=["untied", "tied"])
def test_sizes_count_every_weight_once_and_a_tied_embedding_on_both_ends(shape: Shape) -> None:
    config = llama(shape)
    sizes = sizes_of(config)
    total = sum(torch.Size(spec.shape).numel() for spec in expected_tensors(config).values())
    tied = sizes.embedding if shape.tied else 0
    assert sizes.embedding + sum(sizes.layers) + sizes.head == total + tied
    assert len(set(sizes.layers)) == 1
