"""The bounds table at both ends: what the gateway lets through the engine takes, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import bounds
from engines.runtime.intake import Intake
from engines.runtime.sequence import Sequence
from engines.wire import Generate, Pooling, SamplingParams
from gateway.protocol.chat import ChatCompletionRequest
from gateway.protocol.common import InvalidField, parse_body
from gateway.protocol.completions import CompletionRequest

VOCAB = 1000

# field of the API -> its range there, and in the wire's SamplingParams
SAMPLING_FIELDS = {
    "temperature": bounds.TEMPERATURE,
    "top_p": bounds.TOP_P,
    "top_k": bounds.TOP_K,
    "min_p": bounds.MIN_P,
    "presence_penalty": bounds.PRESENCE_PENALTY,
    "frequency_penalty": bounds.FREQUENCY_PENALTY,
    "repetition_penalty": bounds.REPETITION_PENALTY,
}


def engine_takes(request: Generate) -> bool:
    taken = Intake(2048, [1], prefix_cache=True, vocab_size=VOCAB).take(request)
    if isinstance(taken, Sequence):
        return True
    return taken.error is None  # it ended at once, having nothing to generate


def request_with(**fields: Any) -> Generate:
    return Generate(**{"id": "a", "prompt_ids": [5, 6], "max_tokens": 4, **fields})


def gateway_takes(model: type[Any], **fields: Any) -> bool:
    body = {"model": "m", **fields}
    body |= (
        {"prompt": "x"} if model is CompletionRequest else {"messages": [{"role": "user", "content": "x"}]}
    )
    try:
        parse_body(msgspec.json.encode(body), model)
    except (pydantic.ValidationError, InvalidField):
        return False
    return True


def near(allowed: bounds.Range) -> st.SearchStrategy[float]:
    """Values around both ends, and far from them."""
    steps = st.sampled_from([-1e9, -1.0, -1e-9, 0.0, 1e-9, 1.0, 1e9])
    return st.builds(lambda end, step: end + step, st.sampled_from(allowed), steps)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(SAMPLING_FIELDS)), st.data())
def test_sampling_fields_agree(name: str, data: st.DataObject) -> None:
    allowed = SAMPLING_FIELDS[name]
    value = data.draw(near(allowed))
    if name == "top_k":
        value = int(value)
    at_gateway = gateway_takes(CompletionRequest, **{name: value})
    on_wire = max(value, 0) if name == "top_k" and value >= -1 else value  # -1 is resolved to 0
    at_engine = engine_takes(request_with(sampling=SamplingParams(**{name: on_wire})))
    assert at_gateway == at_engine == allowed.holds(value), value


@settings(deadline=None, max_examples=200)
@given(st.integers(-5, 30), st.booleans())
def test_logprobs_agree(count: int, is_chat: bool) -> None:
    if is_chat:
        at_gateway = gateway_takes(ChatCompletionRequest, logprobs=True, top_logprobs=count)
    else:
        at_gateway = gateway_takes(CompletionRequest, logprobs=count)
        assert at_gateway == gateway_takes(CompletionRequest, prompt_logprobs=count)
        assert at_gateway == engine_takes(request_with(prompt_logprobs=count))
    assert at_gateway == engine_takes(request_with(sampling=SamplingParams(logprobs=count)))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["max_tokens", "min_tokens"]), st.data())
def test_lengths_agree(name: str, data: st.DataObject) -> None:
    value = int(data.draw(near(bounds.GENERATE[name])))
    more = {"max_tokens": bounds.MAX_TOKENS.max} if name == "min_tokens" else {}
    if name == "max_tokens" and value == 0:
        more["echo"] = True  # else it asks for nothing
    at_gateway = gateway_takes(CompletionRequest, **{name: value, **more})
    assert at_gateway == engine_takes(request_with(**{"max_tokens": 4, name: value}))


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(st.integers(0, VOCAB - 1), near(bounds.LOGIT_BIAS), max_size=3),
    st.lists(st.integers(0, VOCAB - 1), max_size=70),
)
@example({}, [1] * bounds.MAX_STOP_TOKEN_IDS)
@example({}, [1] * (bounds.MAX_STOP_TOKEN_IDS + 1))
def test_biases_and_stop_ids_agree(bias: dict[int, float], stop: list[int]) -> None:
    at_gateway = gateway_takes(
        CompletionRequest, logit_bias={str(i): v for i, v in bias.items()}, stop_token_ids=stop
    )
    request = request_with(sampling=SamplingParams(logit_bias=bias), stop_token_ids=stop)
    assert at_gateway == engine_takes(request)


def test_as_many_biases_as_allowed() -> None:
    for count in (bounds.MAX_LOGIT_BIASES, bounds.MAX_LOGIT_BIASES + 1):
        bias = dict.fromkeys(range(count), 1.0)
        intake = Intake(2048, [1], prefix_cache=True, vocab_size=100_000)
        taken = intake.take(request_with(sampling=SamplingParams(logit_bias=bias)))
        assert isinstance(taken, Sequence) == (count <= bounds.MAX_LOGIT_BIASES)
        assert isinstance(taken, Sequence) == gateway_takes(
            CompletionRequest, logit_bias={str(i): 1.0 for i in bias}
        )


TABLE = bounds.SAMPLING | bounds.GENERATE | bounds.POOLING


@pytest.mark.parametrize("name", TABLE)
def test_every_number_of_the_wire_has_a_bound(name: str) -> None:
    """NaN, infinities, and what 64 bits hold."""
    is_int = isinstance(TABLE[name].min, int)
    hostile = [-1, 2**63, 2**64 - 1, -(2**63)] if is_int else [math.nan, math.inf, -math.inf, 1e308]
    for value in hostile:
        if TABLE[name].holds(value):
            continue  # a seed has all 64 bits
        parts: dict[str, Any] = {name: value}
        if name in bounds.SAMPLING:
            parts = {"sampling": SamplingParams(**parts)}
        if name in bounds.POOLING:
            parts = {"max_tokens": 0, "pooling": Pooling(method="mean", **parts)}
        assert not engine_takes(request_with(**parts)), value


def test_the_table_names_every_number_there_is() -> None:
    """A number that is added to the wire without a bound fails here."""
    assert set(SamplingParams.__struct_fields__) - set(bounds.SAMPLING) == {"logit_bias"}
    rest = {"id", "prompt_ids", "stop_token_ids", "ignore_eos", "sampling", "group", "cache_salt"}
    rest |= {"grammar", "pooling"}
    assert set(Generate.__struct_fields__) - set(bounds.GENERATE) == rest | {"resume_token_ids"}
    assert set(Pooling.__struct_fields__) - set(bounds.POOLING) == {"method"}


@pytest.mark.parametrize("name", ["prompt_ids", "resume_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**31, 2**63, -(2**63)])
def test_ids_are_the_models(name: str, wrong: int) -> None:
    assert engine_takes(request_with(**{name: [1, 2, VOCAB - 1]}))
    assert not engine_takes(request_with(**{name: [1, 2, wrong]}))
    assert not engine_takes(request_with(sampling=SamplingParams(logit_bias={wrong: 1.0})))
