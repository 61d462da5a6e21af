"""Do two engines give the same tokens, and if not, is it rounding? Pure.

Two runs of each prompt are compared. Free-running: each engine goes on from its own tokens, and after the
first difference nothing compares. Teacher-forced: each scores the reference's tokens, so every position does.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
"""The largest difference of log-probabilities that rounding explains in each dtype."""


class Verdict(StrEnum):
    IDENTICAL = "identical"  # every token equal
    NUMERICS = "numerics"  # they part only where rounding can decide
    WRONG = "wrong"
    REFUSED = "refused"  # the engine says that it cannot serve this model here
    FAILED = "failed"  # it was to serve, and did not
    SKIPPED = "skipped"  # the machine cannot hold it

    @property
    def is_good(self) -> bool:
        return self not in (Verdict.WRONG, Verdict.FAILED)


class Answer(msgspec.Struct, frozen=True):
    """What one engine gave for one prompt: its own greedy tokens, and how it scores the reference's."""

    token_ids: list[int]
    forced_logprobs: list[float]  # of the reference's tokens, in its context
    forced_top: list[list[tuple[int, float]]]  # the two likeliest at each of these places, best first


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
    max_logprob_difference: float = 0.0
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
        max_logprob_difference=difference,
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
    return max((abs(a - b) if a == a and b == b else float("inf") for a, b in pairs), default=0.0)


def _num_forced_equal(reference: Answer, other: Answer) -> int:
    pairs = zip(reference.token_ids, other.forced_top, strict=True)
    return sum(bool(top) and top[0][0] == token for token, top in pairs)
