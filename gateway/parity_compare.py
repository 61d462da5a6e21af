"""Do two engines give the same tokens, and if not, is it rounding? Pure.

Two runs of each prompt are compared. Free-running: each engine goes on from its own tokens, and after the
first difference nothing compares. Teacher-forced: each scores the reference's tokens, so every position does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
"""The largest difference of log-probabilities that rounding explains in each dtype."""

NUM_TOP = 20
"""Of how many tokens the log-probabilities are compared at each place, beside the reference's own."""


class Verdict(StrEnum):
    IDENTICAL = "identical"  # every token equal
    NUMERICS = "numerics"  # they part only where rounding can decide
    WRONG = "wrong"
    REFUSED = "refused"  # the engine says that it cannot serve this model here
    FAILED = "failed"  # it was to serve, and did not
    SKIPPED = "skipped"  # the machine cannot hold it

    @property
    def is_compared(self) -> bool:
        return self in (Verdict.IDENTICAL, Verdict.NUMERICS, Verdict.WRONG)

    def is_good_in(self, dtype: str) -> bool:
        """In float32, rounding excuses no other token."""
        return self is Verdict.IDENTICAL or (self is Verdict.NUMERICS and dtype != "float32")


class Answer(msgspec.Struct, frozen=True):
    """What one engine gave for one prompt: its own greedy tokens, and how it scores the reference's."""

    token_ids: list[int]
    forced_logprobs: list[float]  # of the reference's tokens, in its context
    forced_top: list[list[tuple[int, float]]]  # the NUM_TOP likeliest at each of these places, best first


class Divergence(msgspec.Struct, frozen=True):
    """Where free-running tokens first part. `margin`: by how much the reference's choice led there."""

    prompt: int
    position: int
    reference_token: int
    token: int
    margin: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One engine beside the reference."""

    name: str
    verdict: Verdict
    reason: str = ""
    num_prompts: int = 0
    num_tokens: int = 0
    num_equal: int = 0  # free-running, up to each prompt's first difference
    num_forced_equal: int = 0  # places where its likeliest token is the reference's
    first: Divergence | None = None
    max_top_logprob_difference: float = 0.0  # teacher-forced: of the reference's tokens and of NUM_TOP
    seconds: float = 0.0


def compare(name: str, reference: Sequence[Answer], other: Sequence[Answer], dtype: str) -> Comparison:
    """Both in the order of the prompts. `dtype` is what was computed in."""
    partings = [
        parting
        for number, (mine, theirs) in enumerate(zip(reference, other, strict=True))
        if (parting := _divergence(number, mine, theirs)) is not None
    ]
    difference = max((_difference(a, b) for a, b in zip(reference, other, strict=True)), default=0.0)
    lost = sum(len(reference[parting.prompt].token_ids) - parting.position for parting in partings)
    num_tokens = sum(len(answer.token_ids) for answer in reference)
    return Comparison(
        name=name,
        verdict=_verdict(partings, difference, TOLERANCES[dtype]),
        num_prompts=len(reference),
        num_tokens=num_tokens,
        num_equal=num_tokens - lost,
        num_forced_equal=sum(_num_forced_equal(a, b) for a, b in zip(reference, other, strict=True)),
        first=partings[0] if partings else None,
        max_top_logprob_difference=difference,
    )


def _verdict(partings: Sequence[Divergence], difference: float, tolerance: float) -> Verdict:
    """A choice that led by more than twice the difference cannot have been turned by it."""
    if not difference <= tolerance:  # NaN is wrong, too
        return Verdict.WRONG
    if not partings:
        return Verdict.IDENTICAL
    close = all(parting.margin <= 2 * tolerance for parting in partings)
    return Verdict.NUMERICS if close else Verdict.WRONG


def _divergence(number: int, reference: Answer, other: Answer) -> Divergence | None:
    for position, token in enumerate(reference.token_ids):
        given = other.token_ids[position] if position < len(other.token_ids) else -1
        if given != token:
            return Divergence(number, position, token, given, _margin(reference.forced_top[position]))
    return None


def _margin(top: Sequence[tuple[int, float]]) -> float:
    return top[0][1] - top[1][1] if len(top) > 1 else float("inf")


def _difference(reference: Answer, other: Answer) -> float:
    pairs = zip(reference.forced_logprobs, other.forced_logprobs, strict=True)
    tops = zip(reference.forced_top, other.forced_top, strict=True)
    found = [_distance(a, b) for a, b in pairs]
    return max([*found, *(_difference_of_tops(dict(a), dict(b)) for a, b in tops)], default=0.0)


def _difference_of_tops(one: dict[int, float], other: dict[int, float]) -> float:
    """Over the tokens of both. What only one of them names is at most as likely to the other as its last."""
    common = [_distance(value, other[token]) for token, value in one.items() if token in other]
    return max([0.0, *common, _lead(one, other), _lead(other, one)])


def _lead(one: dict[int, float], other: dict[int, float]) -> float:
    """How far what `one` alone names is, at the least, above its place in `other`."""
    last = min(other.values(), default=-math.inf)
    return max((value - last for token, value in one.items() if token not in other), default=0.0)


def _distance(a: float, b: float) -> float:
    return math.inf if math.isnan(a) or math.isnan(b) else abs(a - b)


def _num_forced_equal(reference: Answer, other: Answer) -> int:
    pairs = zip(reference.token_ids, other.forced_top, strict=True)
    return sum(bool(top) and top[0][0] == token for token, top in pairs)
