"""Sequences outlive their groups: real supervisor, real deaths, a model that tells the expected tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engines.wire import Generate, Ready, SamplingParams, TokenDelta, TokenLogprob
from gateway.admission import Admission
from gateway.embedding import Embedding
from gateway.metrics import ModelMetrics
from gateway.recovery import PoisonedRequest, Recovery
from gateway.router import ServedModel, ShuttingDown
from gateway.tenant import Tenant
from gateway.workers.group import Group
from gateway.workers.protocol import GroupState, Take, WorkerGroup, WorkerLost
from gateway.workers.supervisor import Supervisor
from tests.fake_group.model import expected, expected_embedding
from tests.fake_group.spec import FakeSpec, Fault, fake_config, fake_group
from tests.fakes import FakeGroup, fake_logprob, ready
from tests.gateway.groups import supervised, until, until_ready
from tests.gateway.serving import (
    client_of,
    data_of,
    ids_of,
    make_app,
    make_group,
    make_served,
)

pytestmark = pytest.mark.anyio
POISON = 666
SPEC = FakeSpec()


@pytest.fixture
def metrics() -> ModelMetrics:
    return ModelMetrics()


_numbers = itertools.count()


def request(prompt: tuple[int, ...] = (20, 30, 40), max_tokens: int = 40, **fields: object) -> Generate:
    return Generate(id=f"r{next(_numbers)}", prompt_ids=list(prompt), max_tokens=max_tokens, **fields)


def served(model_dir: Path, *groups: WorkerGroup, wait: float = 60.0) -> ServedModel:
    return make_served(model_dir, *groups, recovery_wait=wait)


def once(fault: Fault, then: FakeSpec = SPEC) -> Iterator[FakeSpec]:
    """The first start meets the fault."""
    return itertools.chain([FakeSpec(faults=(fault,))], itertools.repeat(then))


@dataclass
class Read:
    """All that came of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    num_cached: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self, delta: TokenDelta) -> None:
        assert delta.error is None
        self.token_ids += delta.token_ids
        self.num_logprobs += len(delta.logprobs)
        if delta.num_cached_tokens is not None:
            self.num_cached.append(delta.num_cached_tokens)
        if delta.finish_reason is not None:
            self.reasons.append(delta.finish_reason)


async def read(model: ServedModel, wire: Generate, metrics: ModelMetrics, into: Read | None = None) -> Read:
    got = into or Read()
    async with asyncio.timeout(60), aclosing(Recovery(model, wire, metrics).deltas()) as deltas:
        async for batch in deltas:
            for delta in batch:
                got.take(delta)
    return got


KINDS = [
    request(sampling=SamplingParams(temperature=0.0)),
    request(sampling=SamplingParams(seed=7)),
    request(sampling=SamplingParams(seed=7, frequency_penalty=0.5, repetition_penalty=1.2)),
    request(sampling=SamplingParams(seed=8, presence_penalty=1.0, logprobs=1)),
    request(sampling=SamplingParams(temperature=0.0), stop_token_ids=list(range(100, 160)), min_tokens=25),
    request(sampling=SamplingParams(seed=9), prompt=tuple(range(100, 200)), max_tokens=33),
    request(sampling=SamplingParams(seed=1), max_tokens=1),
    *(request(sampling=SamplingParams(seed=5), choice=choice, group="siblings") for choice in range(3)),
]


@pytest.mark.parametrize(
    ("phase", "nth", "action"),
    [
        ("prefill", 1, "kill"),
        ("decode", 1, "exit"),
        ("decode", 12, "raise"),
        ("decode", 30, "kill"),
        ("sample", 20, "memory"),
        ("decode", 12, "stop"),
        ("decode", 12, "hang"),
    ],
)
async def test_every_kind_of_sampling_goes_on_exactly(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics, phase: str, nth: int, action: str
) -> None:
    fault = Fault(phase=phase, nth=nth, action=action)  # type: ignore[arg-type]
    async with supervised(tmp_path, fake_group(once(fault))) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        model = served(model_dir, group)
        got = await asyncio.gather(*(read(model, wire, metrics) for wire in KINDS))
        assert group.num_restarts == 1, "the fault took effect"
    for wire, one in zip(KINDS, got, strict=True):
        assert one.token_ids == expected(wire, SPEC.vocab_size)
        assert len(one.reasons) == len(one.num_cached) == 1, "ends and cached tokens are said once"
        assert one.num_logprobs == (len(one.token_ids) if wire.sampling.logprobs is not None else 0)
    assert 0 < metrics.resumed["restarted"] <= len(KINDS)
    assert metrics.resumed["replica"] == metrics.num_poisoned == metrics.recovery_failed.total() == 0


async def test_what_was_pooled_when_its_group_died_is_pooled_anew(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    """The group dies at the second chunk of three; nothing had been delivered."""
    spec = FakeSpec(max_num_batched_tokens=16)
    specs = [FakeSpec(max_num_batched_tokens=16, faults=(Fault(phase="prefill", nth=2),))]
    async with supervised(tmp_path, fake_group(itertools.chain(specs, itertools.repeat(spec)))) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        model, prompts = served(model_dir, group), [[*range(20, 60)], [*range(30, 70)]]
        admission = Admission(model, metrics, timeout=60)
        work = Embedding(admission, prompts, "mean", None, Tenant("anybody", b""))
        vectors = await asyncio.wait_for(work.vectors(), 60)
        assert group.num_restarts == 1, "the fault took effect"
    assert vectors == [expected_embedding(prompt) for prompt in prompts]
    assert metrics.resumed["restarted"] == 2


async def test_what_was_scored_of_a_prompt_is_not_given_twice(model_dir: Path, metrics: ModelMetrics) -> None:
    """A group dies after a part of the prompt's log-probabilities; the next one sends all of them."""
    dying, other = (
        FakeGroup(says=[5, 6, 7], info=ready(400), name=f"fake/{replica}", fails_after=fails)
        for replica, fails in enumerate((1, None))
    )
    got: list[TokenLogprob | None] = []
    tokens: list[int] = []
    model = served(model_dir, dying, other)
    wire = request(prompt=tuple(range(20, 28)), max_tokens=3, prompt_logprobs=1)
    async with aclosing(Recovery(model, wire, metrics).deltas()) as deltas:
        async for batch in deltas:
            for delta in batch:
                got += delta.prompt_logprobs
                tokens += delta.token_ids
    assert metrics.resumed["replica"] == 1, "the death took effect"
    assert got == [None, *(fake_logprob(id, 1) for id in wire.prompt_ids[1:])]
    assert tokens == [5, 6, 7]


async def test_another_replica_goes_on_at_once(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    slow = once(Fault(phase="decode", nth=10), then=FakeSpec(load_seconds=60.0))
    dying, other = fake_group(slow, name="fake/0"), fake_group(SPEC, name="fake/1")
    async with supervised(tmp_path, dying, other) as supervisor:
        first, second = supervisor.groups
        await until_ready(first)
        await until_ready(second)
        wires = [request(sampling=SamplingParams(seed=seed), max_tokens=200) for seed in range(8)]
        model = served(model_dir, first, second)
        got = await asyncio.gather(*(read(model, wire, metrics) for wire in wires))
        assert first.state is not GroupState.READY, "nobody waited for it"
    assert [one.token_ids for one in got] == [expected(wire, SPEC.vocab_size) for wire in wires]
    assert metrics.resumed == {"replica": 4, "restarted": 0}


async def test_a_request_that_kills_twice_is_poison_and_the_group_serves_on(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    spec = FakeSpec(faults=(Fault(phase="prefill", token=POISON),))
    async with supervised(tmp_path, fake_group(spec)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        model = served(model_dir, group)
        with pytest.raises(PoisonedRequest, match="2 groups died"):
            await read(model, request((20, POISON)), metrics)
        await until_ready(group)
        later = request()
        assert (await read(model, later, metrics)).token_ids == expected(later, SPEC.vocab_size)
        assert group.num_restarts == 2
    assert (metrics.num_poisoned, metrics.resumed.total()) == (1, 1)


async def test_a_sequence_that_waits_in_a_dying_gateway_queue_is_sent_to_the_next_group(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    """It was accepted while the group lived and not sent when it died: that is no death of its own."""
    async with supervised(tmp_path, fake_group(SPEC)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        model, wire = served(model_dir, group), request()
        batches = Recovery(model, wire, metrics).deltas()
        group.die("a test")
        group.state = GroupState.RESTARTING
        first = asyncio.create_task(anext(batches))
        await asyncio.sleep(0.1)
        assert not first.done()
        group.state = GroupState.READY
        got = [await first, *[batch async for batch in batches]]
        tokens = [token for batch in got for delta in batch for token in delta.token_ids]
    assert tokens == expected(wire, SPEC.vocab_size)
    assert metrics.resumed.total() == 0


async def lose(
    supervisor: Supervisor, model: ServedModel, metrics: ModelMetrics, reason: str
) -> tuple[Read, Generate]:
    """A sequence that is lost with its group, for that reason."""
    got, wire = Read(), request(max_tokens=2000)
    with pytest.raises(ShuttingDown if reason == "stopping" else WorkerLost):
        await read(model, wire, metrics, got)
    assert metrics.recovery_failed == {"timeout": 0, "changed": 0, "failed": 0, "stopping": 0} | {reason: 1}
    assert all(group.num_outstanding == 0 for group in supervisor.groups)
    assert got.token_ids == expected(wire, SPEC.vocab_size)[: len(got.token_ids)]
    assert 0 < len(got.token_ids) < 2000
    assert got.reasons == []
    return got, wire


AT_TEN = Fault(phase="decode", nth=10)


async def test_the_waiting_has_a_limit(tmp_path: Path, model_dir: Path, metrics: ModelMetrics) -> None:
    spec = once(AT_TEN, then=FakeSpec(load_seconds=60.0))
    async with supervised(tmp_path, fake_group(spec)) as supervisor:
        await until_ready(supervisor.groups[0])
        await lose(supervisor, served(model_dir, *supervisor.groups, wait=0.3), metrics, "timeout")


async def test_other_weights_do_not_go_on(tmp_path: Path, model_dir: Path, metrics: ModelMetrics) -> None:
    spec = once(AT_TEN, then=FakeSpec(fingerprint="fp_other"))
    async with supervised(tmp_path, fake_group(spec)) as supervisor:
        await until_ready(supervisor.groups[0])
        await lose(supervisor, served(model_dir, *supervisor.groups), metrics, "changed")


async def test_a_group_that_failed_for_good_is_not_waited_for(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    config = fake_config().model_copy(update={"max_retry_timeout": 0.0})
    async with supervised(tmp_path, fake_group(once(AT_TEN), config)) as supervisor:
        await until_ready(supervisor.groups[0])
        await lose(supervisor, served(model_dir, *supervisor.groups), metrics, "failed")
        assert supervisor.groups[0].state is GroupState.FAILED


async def test_a_gateway_that_ends_is_not_waited_for(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    async with supervised(tmp_path, fake_group(SPEC)) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        losing = asyncio.create_task(lose(supervisor, served(model_dir, group), metrics, "stopping"))
        await until(lambda: group.stats and group.stats.num_generated_tokens)
        await supervisor.stop(0.0)
        await losing


async def test_a_client_that_leaves_while_its_stream_waits(
    tmp_path: Path, model_dir: Path, metrics: ModelMetrics
) -> None:
    async with supervised(tmp_path, fake_group(once(AT_TEN))) as supervisor:
        (group,) = supervisor.groups
        await until_ready(group)
        reading = asyncio.create_task(read(served(model_dir, group), request(max_tokens=2000), metrics))
        await until(lambda: group.state is not GroupState.READY)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until_ready(group)
        assert (group.num_outstanding, metrics.resumed.total()) == (0, 0)


@dataclass
class Scripted:
    """A group that says what it is told in each of its lives, and is always READY."""

    lives: list[list[TokenDelta]]
    name: str = "scripted/0"
    state: GroupState = GroupState.READY
    info: Ready | None = field(default_factory=lambda: ready(100))
    progress: None = None
    stats: None = None
    failure: None = None
    num_restarts: int = 0
    num_outstanding: int = 0
    sent: list[Generate] = field(default_factory=list)

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        self.sent.append(request)
        for delta in self.lives.pop(0):
            yield [delta]
        if self.lives:
            raise WorkerLost("the script says so")


async def test_a_death_between_the_last_token_and_the_finish_reason(
    model_dir: Path, metrics: ModelMetrics
) -> None:
    wire = request(max_tokens=2)
    tokens = [
        TokenDelta(id=wire.id, token_ids=[1], num_cached_tokens=0),
        TokenDelta(id=wire.id, token_ids=[2]),
    ]
    group = Scripted([tokens, [TokenDelta(id=wire.id, finish_reason="length")]])
    got = await read(served(model_dir, group), wire, metrics)
    assert (got.token_ids, got.reasons) == ([1, 2], ["length"])
    assert [sent.resume_token_ids for sent in group.sent] == [[], [1, 2]]


# Over HTTP: text, usage and stop strings do not know that a group died


async def answer(
    model_dir: Path, groups: list[FakeGroup], **fields: object
) -> tuple[str, dict[str, object], str]:
    """The text of a stream, its usage, and the metrics afterwards."""
    body = {"model": "demo", "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    async with client_of(make_app(model_dir, *groups)) as client:
        response = await client.post("/v1/completions", json=body | fields)
        text = (await client.get("/metrics")).text
    *chunks, usage, done = data_of(response.content)
    assert done == b"[DONE]", response.text

    parts = [choice["text"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    return "".join(parts), json.loads(usage)["usage"], text


@pytest.mark.parametrize("stop", [None, "how are", "never"])
@pytest.mark.parametrize("text", ["Hello world, how are you today?", "Grüße aus München: schöne Straße"])
async def test_text_and_usage_do_not_show_the_death(model_dir: Path, text: str, stop: str | None) -> None:
    num_tokens = len(ids_of(model_dir, text))
    fields = {"max_tokens": num_tokens} | ({"stop": stop} if stop else {})
    plain = make_group(model_dir, text, num_cached_tokens=2)
    undisturbed, usage, _ = await answer(model_dir, [plain], **fields)
    for fails_after in range(1, num_tokens):
        dying = make_group(model_dir, text, num_cached_tokens=2, fails_after=fails_after)
        other = make_group(model_dir, text, num_cached_tokens=5, name="fake/1", num_outstanding=1)
        got, got_usage, metrics = await answer(model_dir, [dying, other], **fields)
        assert (got, got_usage["completion_tokens"]) == (undisturbed, usage["completion_tokens"])
        assert (
            f'generation_tokens_total{{model_name="demo"}} {float(got_usage["completion_tokens"])}' in metrics
        )  # type: ignore[arg-type]
        resumed = len(other.requests)
        assert f'streams_resumed_total{{model_name="demo",where="replica"}} {float(resumed)}' in metrics
        if resumed:
            assert other.requests[0].resume_token_ids == dying.says[:fails_after]


async def test_poison_is_its_own_error_and_is_not_to_be_tried_again(model_dir: Path) -> None:
    groups = [make_group(model_dir, fails_after=1, name=f"fake/{number}") for number in range(3)]
    groups[1].fails_after = 2
    async with client_of(make_app(model_dir, *groups)) as client:
        response = await client.post("/v1/completions", json={"model": "demo", "prompt": "hi"})
        text = (await client.get("/metrics")).text
    assert (response.status_code, response.json()["error"]["code"]) == (500, "request_poisoned")
    assert response.headers["x-should-retry"] == "false"
    assert groups[2].requests == []
    assert 'requests_poisoned_total{model_name="demo"} 1.0' in text
    assert 'request_errors_total{code="request_poisoned"} 1.0' in text


def test_the_group_is_one() -> None:
    """Group and the fakes are what the gateway sees as one."""
    groups: list[WorkerGroup] = [Scripted([]), Group("g", fake_config())]
    assert len(groups) == 2
