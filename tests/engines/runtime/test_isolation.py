"""Nothing of one sequence reaches another: not what it leaves in the K/V, no NaN, no exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import Engine
from engines.runtime.blocks import BlockPool, Unaccounted
from engines.wire import Abort, Generate, SamplingParams
from tests.engines.reference import prompts, request_of
from tests.engines.runtime.in_process import Ended, InProcess, alone
from tests.models import MHA, make_llama
from tests.soak import injected_exceptions, random_mixes
from tests.soak.random_mixes import Requests, Seen, run_mix

POISON = 7
"""The token whose embedding is not a number, in the poisoned model."""
SHOWN = SamplingParams(temperature=0.0, logprobs=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "mha", MHA, seed=3)


@pytest.fixture(params=[torch.nan, torch.inf, -torch.inf], ids=str)
def poisoned(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Any sequence with the token POISON computes what is not finite from there on."""
    embedding = engine._model.embedding  # type: ignore[attr-defined]
    with torch.inference_mode():
        kept = embedding[POISON].clone()
        embedding[POISON] = request.param
    yield engine
    with torch.inference_mode():
        embedding[POISON] = kept


def clean_prompts(count: int, seed: int) -> list[list[int]]:
    return [[token + (token == POISON) for token in ids] for ids in prompts(count, MHA.vocab, seed)]


def requests_of(batch: list[list[int]], max_tokens: int = 12) -> list[Generate]:
    return [request_of(str(i), prompt, max_tokens, sampling=SHOWN) for i, prompt in enumerate(batch)]


def free_blocks(pool: BlockPool) -> list[int]:
    return list(pool._free)


def fill(group: InProcess, blocks: list[int], value: float) -> None:
    for cache in group.caches:
        cache.data[blocks] = value


def tokens_of(ended: list[Ended]) -> list[list[int]]:
    return [one.token_ids for one in ended]


def assert_failed(ended: Ended) -> None:
    assert ended.error is not None
    assert ended.error.code == "internal"
    assert "not finite" in ended.error.message


def test_lost_blocks_and_slots_are_taken_back_when_idle(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    group = InProcess(engine, num_blocks=40)
    one, two = requests_of([list(range(20, 60)), list(range(60, 100))])
    (first,) = group.run([one])
    for _ in range(3):
        group.leader.step()
    assert group.scheduler.stats(0).num_account_faults == 0
    assert group.scheduler.stats(0).num_blocks_cached > 0, "an audit that finds nothing changes nothing"
    group.scheduler._pool.allocate()
    group.scheduler._free_slots.pop()
    with pytest.raises(Unaccounted, match="holders"):
        group.scheduler.check()
    group.run([two], check=False)
    for _ in range(3):
        group.leader.step()
    group.assert_empty()
    group.scheduler.check()
    assert group.inbox.stats is not None
    assert group.inbox.stats.num_account_faults == 1
    assert "K/V accounts are wrong: block holders" in caplog.text
    (again,) = group.run([request_of("again", one.prompt_ids, 12, sampling=SHOWN)])
    assert again.token_ids == first.token_ids
    assert again.num_cached_tokens == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_lies_in_free_blocks_is_never_read(engine: Engine, value: float) -> None:
    """Filled anew before every round: the same bits come out, with preemptions, chunks, shared prefixes."""
    requests = requests_of(clean_prompts(12, seed=1), 20)

    def run(*, is_filled: bool) -> tuple[list[Ended], int]:
        group = InProcess(engine, num_blocks=40, block_size=8, max_num_seqs=8, max_batched=32)
        pool = group.scheduler._pool

        def each_round() -> None:
            if is_filled:
                fill(group, free_blocks(pool), value)

        each_round()
        return group.run(requests, each_round), group.scheduler.stats(0).num_preemptions

    with torch.inference_mode():
        filled, num_preemptions = run(is_filled=True)
        clean, _ = run(is_filled=False)
    assert num_preemptions > 0
    assert filled == clean, "tokens and log-probabilities are the same to the bit"
    assert all(one.finish_reason == "length" for one in clean)


def test_a_sequence_that_is_not_finite_fails_alone(poisoned: Engine) -> None:
    """Its mates compute the same bits as beside a healthy one, in the step in which it fails, and after."""
    mates = requests_of(clean_prompts(6, seed=2))
    prompt = clean_prompts(1, seed=3)[0][:30]

    def run(victim: Generate) -> tuple[Ended, list[Ended], list[Ended]]:
        group = InProcess(poisoned, num_blocks=64, block_size=8)
        first, *others = group.run([victim, *mates])
        group.assert_empty()
        later = [request_of(f"later {one.id}", one.prompt_ids[::-1], sampling=SHOWN) for one in mates]
        return first, others, group.run(later)

    sick, *after_sick = run(request_of("victim", [*prompt, POISON], 1, sampling=SHOWN))
    sound, *after_sound = run(request_of("victim", [*prompt, POISON + 1], 1, sampling=SHOWN))
    assert_failed(sick)
    assert sick.token_ids == []
    assert sound.finish_reason == "length"
    assert after_sick == after_sound
    assert tokens_of(after_sick[0]) == [alone(poisoned, one).token_ids for one in mates]


def test_a_chunk_that_is_not_finite_is_not_found_by_others(poisoned: Engine) -> None:
    """It is in a long prompt's middle, where nothing is sampled; the chunk's earlier tokens suffer too."""
    stem = list(range(20, 50))
    group = InProcess(poisoned, block_size=4, max_batched=16)
    before = alone(poisoned, request_of("alone", [*stem, 9], sampling=SHOWN))
    (sick,) = group.run([request_of("sick", [*stem, POISON, *range(100, 150)])])
    assert_failed(sick)
    (sound,) = group.run([request_of("sound", [*stem, 9], sampling=SHOWN)])
    assert sound.token_ids == before.token_ids
    assert sound.num_cached_tokens == 16, "the chunk before it was finite, and is found"
    (sicker,) = group.run([request_of("again", [*stem, POISON, 100], prompt_logprobs=0)])
    assert_failed(sicker)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_memory_that_goes_bad_fails_those_that_read_it(engine: Engine, value: float) -> None:
    """In the block of one of eight while they decode; whoever owns it next is well."""
    requests = requests_of(clean_prompts(8, seed=5), 30)
    group = InProcess(engine, num_blocks=120, block_size=8, prefix_cache=False)
    hurt: list[int] = []

    def each_round() -> None:
        if group.scheduler.stats(0).num_generated_tokens > 80 and not hurt:
            victim = next(one for one in group.scheduler._running if one.id == "3")
            hurt.extend(victim.block_table)
            with torch.inference_mode():
                fill(group, hurt[:1], value)

    ended = group.run(requests, each_round)
    assert hurt
    assert_failed(ended.pop(3))
    expected = [alone(engine, one).token_ids for one in requests if one.id != "3"]
    assert tokens_of(ended) == expected
    again = group.run([request_of(f"again {one.id}", one.prompt_ids, 30, sampling=SHOWN) for one in requests])
    assert tokens_of(again) == [alone(engine, one).token_ids for one in requests]


def test_every_token_banned_is_the_requests_own_failure(engine: Engine) -> None:
    """Nothing is left to draw from. (The bounds do not allow as many stop tokens; a small model might.)"""
    good, bad = requests_of(clean_prompts(2, seed=6))
    group = InProcess(engine)
    group.scheduler._intake._vocab_size = (
        2**31
    )  # as if the bounds had a hole: an id that is out of the logits
    hole: dict[str, Any] = {"sampling": SamplingParams(temperature=0.0, logit_bias={MHA.vocab + 5: 1.0})}
    first, second = group.run([good, request_of("hole", bad.prompt_ids, **hole)])
    assert first.token_ids == alone(engine, good).token_ids
    assert second.error is not None
    assert second.error.code == "internal"


def test_random_mixes_give_what_each_request_gives_alone(engine: Engine) -> None:
    """The first of the soak's 10,000."""
    seen, draw = Seen(), random.Random(2)
    requests = Requests(engine, seed=2, count=30)
    for _ in range(12):
        run_mix(engine, requests, draw, seen)
    assert seen.differences == []
    assert seen.counts["preemptions"] > 0
    assert seen.counts["prompt tokens from the prefix cache"] > 0
    assert seen.counts["compared tokens"] > 100


def test_injected_exceptions_hurt_nobody_else() -> None:
    """The soak's first."""
    figures = injected_exceptions.run(30, seed=4)
    assert figures["failed"] == 0, figures["differences"]
    assert figures["injected"] >= 30


def test_a_difference_would_be_seen(engine: Engine) -> None:
    """The comparison itself: another seed is another answer."""
    requests = Requests(engine, seed=3, count=20)
    number = next(
        i for i, f in enumerate(requests.made) if f[0].sampling.temperature > 0.9 and f[0].max_tokens > 8
    )
    one = requests.made[number][0]
    group = InProcess(engine)
    other = requests.made[number - 1][0]
    group.inbox.ended[one.id] = alone(engine, other)
    seen = Seen()
    random_mixes.compare(one, group, requests.alone(number, 0), False, seen)
    assert len(seen.differences) == 1


# ---------------------------------------------------------------------- leaving


def phase_of(name: str) -> dict[str, int]:
    """How a group has to be made for a sequence to be in that phase, and rounds to get there."""
    return {
        "queued": {"max_num_seqs": 1, "rounds": 3},
        "in prefill": {"max_batched": 16, "rounds": 3},
        "decoding": {"rounds": 5},
    }[name]


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("phase", ["queued", "in prefill", "decoding"])
def test_who_leaves_is_gone_after_one_round(engine: Engine, phase: str, num_choices: int) -> None:
    """Blocks, slot and tokens: from the round in which the Abort is read. A mate notices nothing."""
    how = phase_of(phase)
    rounds = how.pop("rounds")
    group = InProcess(engine, block_size=8, **how)
    mate = request_of("mate", list(range(20, 60)), 30, sampling=SHOWN)
    leaving = [
        request_of(f"leaving {c}", list(range(60, 160)), 500, choice=c, group="leaving" * (num_choices > 1))
        for c in range(num_choices)
    ]
    group.send(mate, *leaving)
    for _ in range(rounds):
        group.step()
    known = {one.id: one for one in group.scheduler._sequences.values()}
    states = {
        "queued": lambda one: one.slot < 0,
        "in prefill": lambda one: one.slot >= 0 and one.num_computed_tokens < one.num_prompt_tokens,
        "decoding": lambda one: len(one.token_ids) > one.num_prompt_tokens,
    }
    assert states[phase](known["leaving 0"]), "it is where it was meant to be"
    given = [len(group.ended(one.id).token_ids) for one in leaving]
    group.send(*(Abort(one.id) for one in leaving))
    group.step()
    assert set(group.scheduler._sequences) == {"mate"}
    stats = group.scheduler.stats(0)
    assert stats.num_blocks_used == len(known["mate"].block_table)
    assert [len(group.ended(one.id).token_ids) for one in leaving] == given, "nothing more came"
    (ended,) = group.run([]) or [group.ended("mate")]
    assert ended.token_ids == alone(engine, mate).token_ids
    group.assert_empty()


def test_salts_keep_prefixes_apart_through_siblings_resumption_and_preemption(engine: Engine) -> None:
    """`InProcess` checks after every round that no block is shared between salts."""
    stem = list(range(20, 84))
    group = InProcess(engine, num_blocks=22, block_size=8, max_num_seqs=4)

    def ask(id: str, salt: bytes, **more: Any) -> Generate:
        return request_of(id, stem, 40, cache_salt=salt, sampling=SHOWN, **more)

    expected = alone(engine, ask("alone", b"")).token_ids
    (first,) = group.run([ask("first", b"a")])
    (other,) = group.run([ask("other", b"b")])
    (same,) = group.run([ask("same", b"b")])
    assert (first.num_cached_tokens, other.num_cached_tokens, same.num_cached_tokens) == (0, 0, 63)
    (resumed,) = group.run([ask("resumed", b"c", resume_token_ids=expected[:10])])
    assert resumed.token_ids == expected[10:]
    assert resumed.num_cached_tokens in (None, 0), "another tenant's blocks are not read for it"
    mixed = [
        ask(f"{salt!r} {c}", salt, choice=c, group=f"{salt!r}") for salt in (b"a", b"b") for c in range(2)
    ]
    ended = group.run(mixed)
    assert group.scheduler.stats(0).num_preemptions > 0
    assert [one.token_ids for one in (first, other, same, *ended)] == [expected] * 7
