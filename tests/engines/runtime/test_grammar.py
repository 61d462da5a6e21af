"""Grammars in the real scheduler, runner and sampler: what is constrained follows, others do not notice."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

from engines.base import Engine
from engines.runtime import grammar
from engines.runtime.grammar import MAX_CACHED, Constraint, GrammarFailed, Grammars, token_masks
from engines.wire import Generate, SamplingParams
from tests.engines.harness import Ended
from tests.engines.reference import prompts, request_of
from tests.engines.runtime.in_process import EOS, InProcess, alone
from tests.models import MHA, make_llama, write_byte_tokenizer
from tests.soak import schemas

SHAPE = replace(MHA, vocab=301)  # wider than the tokenizer's 258
PERSON = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)
DIGITS = LLMatcher.grammar_from_regex("[0-9]{5,40}")
EXPONENTIAL = LLMatcher.grammar_from_regex("[ab]*a[ab]{40}")
RANDOM = SamplingParams(temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_llama(tmp_path_factory.mktemp("models") / "bytes", SHAPE, seed=3)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture
def grammars(model: Path) -> Grammars:
    return Grammars(model / "tokenizer.json", SHAPE.vocab, [EOS])


def ask(
    id: str, grammar: str, sampling: SamplingParams = RANDOM, max_tokens: int = 120, **more: object
) -> Generate:
    prompt = prompts(1, 258, seed=sum(id.encode()))[0]
    return request_of(id, prompt, max_tokens, sampling=sampling, grammar=grammar, **more)


def seeded(seed: int, temperature: float = 1.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed)


def tokens_of(ended: list[Ended]) -> list[list[int]]:
    return [one.token_ids for one in ended]


def assert_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"a", "b"}


def ready(constraint: Constraint) -> Constraint:
    deadline = time.monotonic() + 60
    while not constraint.is_ready:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return constraint


def test_a_mixed_batch(engine: Engine, grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Free rows as they are alone, to the token; constrained ones, too, and as their grammars say."""
    free = [
        request_of(f"f{i}", prompt, 40, sampling=seeded(i, i % 3 / 2))
        for i, prompt in enumerate(prompts(8, 258, seed=1))
    ]
    bound = [ask(f"c{i}", PERSON if i % 2 else DIGITS, seeded(i, i % 4 / 2)) for i in range(8)]
    mixed = [request for pair in zip(free, bound, strict=True) for request in pair]
    ended = InProcess(engine, grammars=grammars).run(mixed)
    assert ended[::2] == [alone(engine, request) for request in free]
    for request, one in zip(bound, ended[1::2], strict=True):
        assert one.token_ids == alone(engine, request, grammars).token_ids
        assert one.finish_reason == "stop"
        assert one.token_ids[-1] == EOS
        text = tokenizer.decode(one.token_ids)
        if request.grammar == PERSON:
            assert_person(text)
        else:
            assert text.isdigit()
            assert 5 <= len(text) <= 40


def test_choices_fork(engine: Engine, grammars: Grammars, tokenizer: Tokenizer) -> None:
    requests = [
        msgspec.structs.replace(ask("n", PERSON), id=f"n{choice}", choice=choice, group="n")
        for choice in range(6)
    ]
    ended = InProcess(engine, grammars=grammars).run(requests)
    texts = [tokenizer.decode(one.token_ids) for one in ended]
    for text in texts:
        assert_person(text)
    assert len(set(texts)) == 6


def test_preemption_changes_nothing(engine: Engine, grammars: Grammars) -> None:
    requests = [ask(f"p{i}", PERSON, seeded(i)) for i in range(6)]
    group = InProcess(engine, num_blocks=20, block_size=8, max_batched=64, grammars=grammars)
    ended = group.run(requests)
    assert group.scheduler.stats(0).num_preemptions > 0, "the pool was meant to be too small"
    assert tokens_of(ended) == tokens_of([alone(engine, request, grammars) for request in requests])
    group.assert_empty()


def test_resumed_sequences_go_on_identically(engine: Engine, grammars: Grammars) -> None:
    """As after a group's death: what was delivered comes back, for another group to go on with."""
    request = ask("r", PERSON)
    whole = alone(engine, request, grammars)
    assert whole.finish_reason == "stop"
    for count in range(1, len(whole.token_ids), 7):
        resumed = msgspec.structs.replace(request, resume_token_ids=whole.token_ids[:count])
        rest = alone(engine, resumed, grammars)
        assert (rest.token_ids, rest.finish_reason) == (whole.token_ids[count:], "stop")


def test_a_resumed_sequence_that_was_complete_has_ended(engine: Engine, grammars: Grammars) -> None:
    whole = alone(engine, ask("r", DIGITS), grammars)
    resumed = msgspec.structs.replace(ask("r", DIGITS), resume_token_ids=whole.token_ids)
    rest = alone(engine, resumed, grammars)
    assert (rest.token_ids, rest.finish_reason) == ([], "stop")


def test_what_does_not_follow_the_grammar_is_no_resumption(engine: Engine, grammars: Grammars) -> None:
    resumed = msgspec.structs.replace(ask("r", DIGITS), resume_token_ids=[40, 99])
    good, bad = InProcess(engine, grammars=grammars).run([ask("g", DIGITS), resumed])
    assert good.finish_reason == "stop"
    assert bad.error is not None
    assert bad.error.code == "invalid_request"


@pytest.mark.parametrize(
    "more",
    [
        {"min_tokens": 100},
        {"ignore_eos": True},
        {"sampling": msgspec.structs.replace(RANDOM, logit_bias={EOS: -100.0})},
        {"sampling": msgspec.structs.replace(RANDOM, logit_bias={258: 100.0, 290: 100.0})},
        {"sampling": msgspec.structs.replace(RANDOM, repetition_penalty=2.0, frequency_penalty=2.0)},
        {"sampling": msgspec.structs.replace(RANDOM, top_k=1)},
        {"sampling": msgspec.structs.replace(RANDOM, top_p=0.01, min_p=0.9)},
        {"sampling": msgspec.structs.replace(RANDOM, temperature=2.0)},
    ],
    ids=str,
)
def test_other_parameters_keep_working(
    engine: Engine, grammars: Grammars, tokenizer: Tokenizer, more: dict[str, object]
) -> None:
    """A grammar that is complete ends the text, whatever else was wanted."""
    request = msgspec.structs.replace(ask("o", "start: /[a-c]{8}/"), **more)
    ended = alone(engine, request, grammars)
    text = tokenizer.decode(ended.token_ids)
    assert ended.finish_reason == "stop"
    assert len(text) == 8
    assert set(text) <= set("abc")


def test_bans_hold_where_there_is_another_way(
    engine: Engine, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    biased = SamplingParams(temperature=0.0, logit_bias={EOS: 100.0})
    early = alone(engine, ask("m", DIGITS, biased), grammars)
    late = alone(engine, ask("m", DIGITS, biased, min_tokens=20), grammars)
    assert [len(tokenizer.decode(one.token_ids)) for one in (early, late)] == [5, 20]


def test_biases_and_stop_tokens_choose_within_the_grammar(
    engine: Engine, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    seven = tokenizer.encode("7", add_special_tokens=False).ids[0]
    biased = SamplingParams(temperature=1.0, logit_bias={seven: 100.0})
    assert tokenizer.decode(alone(engine, ask("b", DIGITS, biased), grammars).token_ids) == "7" * 40
    stopped = alone(engine, ask("b", DIGITS, biased, stop_token_ids=[seven]), grammars)
    assert (stopped.token_ids, stopped.finish_reason) == ([seven], "stop")


def test_length_ends_it_underway(engine: Engine, grammars: Grammars, tokenizer: Tokenizer) -> None:
    whole = alone(engine, ask("l", PERSON), grammars)
    for count in (1, 5, 10):
        part = alone(engine, ask("l", PERSON, max_tokens=count), grammars)
        assert (part.token_ids, part.finish_reason) == (whole.token_ids[:count], "length")


@torch.inference_mode()
def test_logprobs_are_of_the_models_own_distribution(
    engine: Engine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[torch.Tensor] = []
    logits_of = engine.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor | None:
        result = logits_of(hidden)
        assert result is not None
        rows.append(result.log_softmax(-1))
        return result

    monkeypatch.setattr(engine, "logits", logits)
    shown = msgspec.structs.replace(RANDOM, logprobs=3)
    ended = alone(engine, ask("g", DIGITS, shown), grammars)
    assert len(rows) == len(ended.token_ids) == len(ended.logprobs) > 5
    for row, token_id, shown_logprob in zip(rows, ended.token_ids, ended.logprobs, strict=True):
        assert shown_logprob.logprob == pytest.approx(row[0, token_id].item(), abs=1e-5)
        best = row[0].topk(3)
        assert [id for id, _ in shown_logprob.top] == best.indices.tolist()


def test_a_constrained_sequence_does_not_run_ahead(engine: Engine, grammars: Grammars) -> None:
    """Free ones do, in the same group; the tokens are the same."""
    requests = [ask("a1", PERSON), request_of("a2", prompts(1, 258, seed=9)[0], 40), ask("a3", DIGITS)]
    group = InProcess(engine, grammars=grammars, plans_in_flight=2, run_ahead=True)
    ended = group.run(requests)
    assert [one.token_ids for one in ended] == [alone(engine, each, grammars).token_ids for each in requests]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("start: /[/", "regex"),
        ('start: "a" missing', "missing"),
        ("{", "EOF"),
        (LLMatcher.grammar_from_json_schema({"type": "object", "not": {}}), "not"),
        ("start: start", "NoExtension"),
    ],
)
def test_a_broken_grammar_fails_alone(
    engine: Engine, grammars: Grammars, broken: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = [ask("g1", PERSON), request_of("g2", prompts(1, 258, seed=2)[0])]
    group = InProcess(engine, grammars=grammars)
    first, bad, second = group.run([good[0], ask("bad", broken), good[1]])
    assert first == alone(engine, good[0], grammars)
    assert second.token_ids == alone(engine, good[1]).token_ids
    assert bad.error is not None
    assert (bad.error.code, bad.token_ids) == ("invalid_request", [])
    assert why in bad.error.message
    assert "grammar cannot be followed" in caplog.text
    assert bad.error.message not in caplog.text, "the log does not tell what a request said"
    group.assert_empty()


def test_a_grammar_that_grows_too_large_fails_alone(
    engine: Engine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(max_lexer_states=300, verbose_errors=False))
    group = InProcess(engine, grammars=grammars)
    good = [ask(f"g{i}", PERSON, seeded(i)) for i in range(3)]
    *ended, bad = group.run([*good, ask("bad", EXPONENTIAL, max_tokens=1900, min_tokens=1900)])
    assert ended == [alone(engine, each, grammars) for each in good]
    assert bad.error is not None
    assert "too many states" in bad.error.message
    assert bad.token_ids, "it was underway"
    group.assert_empty()


def test_what_others_used_up_is_not_held_against_a_sequence(
    engine: Engine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of one grammar share its automaton, whose size is bounded; each can have its own."""
    request = ask("one", EXPONENTIAL, max_tokens=60)
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(max_lexer_states=100_000, verbose_errors=False))
    expected = alone(engine, request, grammars).token_ids
    limits = LLParserLimits(max_lexer_states=3_000, verbose_errors=False)
    monkeypatch.setattr(grammar, "LIMITS", limits)
    again = Grammars(grammars._tokenizer_file, SHAPE.vocab, [EOS])
    compiled: list[str] = []
    compile_one = again._compile
    monkeypatch.setattr(again, "_compile", lambda text: compiled.append(text) or compile_one(text))
    others = [ask(f"{i}", EXPONENTIAL, seeded(i, 2.0), max_tokens=60) for i in range(40)]
    ended = InProcess(engine, grammars=again).run([*others, request])
    assert ended[-1].token_ids == expected
    assert len(compiled) > 1, "they were meant to use it up"
    assert not [one.error for one in ended if one.error]


def test_a_model_that_lacks_a_byte_fails_the_grammar_that_needs_it(
    model: Path, tmp_path: Path, engine: Engine
) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["\u0100missing"] = content["model"]["vocab"].pop("z")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    grammars = Grammars(tmp_path / "tokenizer.json", SHAPE.vocab, [EOS])
    good, bad = InProcess(engine, grammars=grammars).run([ask("g", DIGITS), ask("b", "start: /yz/")])
    assert good.finish_reason == "stop"
    assert bad.error is not None
    assert bad.error.code == "invalid_request"


@pytest.mark.parametrize(
    ("tokenizer_json", "eos", "why"),
    [
        (None, [EOS], "cannot be read"),
        ("{}", [EOS], "cannot be read"),
        ("good", [], "no end token"),
    ],
)
def test_a_model_that_cannot_be_constrained_serves_the_rest(
    engine: Engine, model: Path, tmp_path: Path, tokenizer_json: str | None, eos: list[int], why: str
) -> None:
    if tokenizer_json is not None:
        text = (model / "tokenizer.json").read_text() if tokenizer_json == "good" else tokenizer_json
        (tmp_path / "tokenizer.json").write_text(text)
    free = request_of("f", prompts(1, 258, seed=2)[0])
    grammars = Grammars(tmp_path / "tokenizer.json", SHAPE.vocab, eos)
    bad, good = InProcess(engine, grammars=grammars).run([ask("b", DIGITS), free])
    assert good.token_ids == alone(engine, free).token_ids
    assert bad.error is not None
    assert why in bad.error.message


def test_without_grammars_constrained_sequences_are_refused(engine: Engine) -> None:
    ended = alone(engine, ask("x", DIGITS))
    assert ended.error is not None
    assert "follows no grammar" in ended.error.message


def test_sequences_wait_for_their_grammar_and_others_pass(
    engine: Engine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = grammars._thread.submit(time.sleep, 0.5)
    group = InProcess(engine, grammars=grammars)
    group.send(ask("waits", DIGITS), request_of("goes", prompts(1, 258, seed=3)[0], 4))
    group.step()
    assert not hold.done()
    assert len(group.ended("goes").token_ids) == 1
    while group.scheduler.has_work:
        group.step()
    assert group.ended("waits").finish_reason == "stop"


def test_compiled_grammars_are_kept_up_to_a_cap(grammars: Grammars) -> None:
    texts = [f"start: /a{{{i + 1}}}/" for i in range(MAX_CACHED + 5)]
    first = ready(grammars.begin(texts[0]))
    assert ready(grammars.begin(texts[0]))._compiled is first._compiled
    for text in texts[1:]:
        ready(grammars.begin(text))
    assert len(grammars._compiled) == MAX_CACHED
    assert grammars.begin(texts[-1])._compiled.done()
    assert grammars.begin(texts[0])._compiled is not first._compiled


def test_masks_ban_tokens_above_the_sign_bit(grammars: Grammars) -> None:
    """Every id of a word, the 32nd among them."""
    constraint = ready(grammars.begin("start: /(?s:.)/"))
    allowed = token_masks([(constraint, ())], SHAPE.vocab)[0]
    ids = [id for id in range(SHAPE.vocab) if allowed[id >> 5] >> (id & 31) & 1]
    assert {31, 63, 95} <= set(ids)
    banned = tuple(ids[1:])
    masked = token_masks([(constraint, banned)], SHAPE.vocab)[0]
    assert [id for id in range(SHAPE.vocab) if masked[id >> 5] >> (id & 31) & 1] == [ids[0]]
    with pytest.raises(GrammarFailed):
        ready(grammars.begin("start: /[/")).follow([1, 2], 0)


def test_outputs_are_of_their_schemas(engine: Engine, model: Path) -> None:
    """The short version of tests/soak/schemas.py."""
    figures = schemas.run(25)
    assert figures["failed"] == 0
    assert figures["complete"] >= 15
