"""/v1/completions beyond plain text: echo, prompts' logprobs, best_of, suffix; streamed and whole."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Tokenizers

from engines.wire import Generate, TokenDelta, TokenLogprob
from gateway.prompt.infill import infill_of
from gateway.prompt.tokenizer import Tokenizer
from gateway.protocol import bounds
from gateway.workers.protocol import Take
from tests.fakes import FakeGroup, prompt_deltas, ready
from tests.gateway.serving import (
    client_of,
    data_of,
    ids_of,
    make_app,
    make_group,
    make_model_dir,
    make_served,
)

pytestmark = pytest.mark.anyio
TEXT = "Hello world, how are you today?"
HALF = pytest.approx(-math.log(2))
PROMPT = "Grüße aus München"
Json = dict[str, Any]


async def ask(model_dir: Path, group: FakeGroup, **fields: Any) -> httpx.Response:
    async with client_of(make_app(model_dir, group)) as client:
        return await client.post("/v1/completions", json={"model": "demo", "prompt": PROMPT} | fields)


async def choices_of(model_dir: Path, group: FakeGroup, **fields: Any) -> list[Json]:
    response = await ask(model_dir, group, **fields)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return choices  # type: ignore[no-any-return]


async def streamed(model_dir: Path, group: FakeGroup, **fields: Any) -> list[Json]:
    """The choices of a stream put together, with the texts of their first chunks as `first`."""
    response = await ask(model_dir, group, stream=True, **fields)
    assert response.status_code == 200, response.text
    whole: dict[int, Json] = {}
    for data in data_of(response.content)[:-1]:
        for chunk in json.loads(data)["choices"]:
            choice = whole.setdefault(chunk["index"], {"text": "", "logprobs": None, "first": chunk["text"]})
            choice["text"] += chunk["text"]
            choice["finish_reason"] = chunk["finish_reason"]
            if chunk["logprobs"]:
                choice["logprobs"] = choice["logprobs"] or {}
                for name, values in chunk["logprobs"].items():
                    choice["logprobs"][name] = (choice["logprobs"].get(name) or []) + (values or [])
    return [whole[index] for index in sorted(whole)]


async def refusal(model_dir: Path, group: FakeGroup, **fields: Any) -> tuple[str, str]:
    response = await ask(model_dir, group, **fields)
    assert response.status_code == 400, response.text
    assert group.requests == [], "refused before anything was sent"
    error = response.json()["error"]
    return error["param"], error["message"]


def assert_offsets(choice: Json) -> None:
    """Each token that is whole text stands where its offset says."""
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset : offset + len(token)] == token


# Echo


async def test_echo_puts_the_prompt_in_front(model_dir: Path, group: FakeGroup) -> None:
    [choice] = await choices_of(model_dir, group, echo=True)
    assert (choice["text"], choice["logprobs"]) == (PROMPT + TEXT, None)
    assert group.requests[0].prompt_logprobs is None


async def test_echo_spells_out_what_ids_say(model_dir: Path, group: FakeGroup) -> None:
    ids = [0, *ids_of(model_dir, PROMPT), 2]
    [choice] = await choices_of(model_dir, group, prompt=ids, echo=True, logprobs=1)
    assert choice["text"] == f"<|begin|>{PROMPT}<|user|>{TEXT}"
    assert_offsets(choice)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(model_dir: Path, group: FakeGroup, stream: bool) -> None:
    how = streamed if stream else choices_of
    [choice] = await how(model_dir, group, echo=True, logprobs=2)
    ids = group.requests[0].prompt_ids
    assert group.requests[0].prompt_logprobs == 2
    logprobs, num_prompt = choice["logprobs"], len(ids)
    assert len(logprobs["tokens"]) == num_prompt + len(group.says) + 1, "the end token is there"
    assert (logprobs["tokens"][0], logprobs["tokens"][-1]) == ("<|begin|>", "<|end|>")
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["token_logprobs"][1:] == [HALF] * (len(logprobs["tokens"]) - 1)
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top
        assert len(top) == 2
    assert logprobs["text_offset"][:2] == [0, 0], "what the model puts in front is not in the text"
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)
    assert logprobs["text_offset"][-1] == len(PROMPT + TEXT)
    assert_offsets(choice)


async def test_a_prompt_of_many_tokens_is_shaped_in_a_thread(model_dir: Path) -> None:
    group = make_group(model_dir, info=ready(400, max_model_len=10_000))
    prompt = ids_of(model_dir, PROMPT) * 400
    [choice] = await choices_of(model_dir, group, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    assert choice["text"] == PROMPT * 400
    assert_offsets(choice)


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_tokens_but_the_prompt(
    model_dir: Path, group: FakeGroup, logprobs: int | None, stream: bool
) -> None:
    how = streamed if stream else choices_of
    [choice] = await how(model_dir, group, echo=True, max_tokens=0, logprobs=logprobs)
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert group.requests[0].max_tokens == 0
    if logprobs is not None:
        assert len(choice["logprobs"]["tokens"]) == len(group.requests[0].prompt_ids)
        assert bool(choice["logprobs"]["top_logprobs"]) == (logprobs > 0)


async def test_a_prompt_as_long_as_the_model_can_be_scored(model_dir: Path, group: FakeGroup) -> None:
    assert group.info is not None
    prompt = [7] * group.info.max_model_len
    [choice] = await choices_of(model_dir, group, prompt=prompt, echo=True, max_tokens=0, logprobs=0)
    assert len(choice["logprobs"]["tokens"]) == len(prompt)
    assert (await ask(model_dir, group, prompt=prompt, echo=True, max_tokens=1)).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_batches_and_choices_echo_their_own_prompt(
    model_dir: Path, group: FakeGroup, stream: bool
) -> None:
    how = streamed if stream else choices_of
    prompts = ["Hello", "The quick", "user"]
    choices = await how(model_dir, group, prompt=prompts, n=2, echo=True, logprobs=1)
    assert [choice["text"] for choice in choices] == [p + TEXT for p in prompts for _ in range(2)]
    for choice in choices:
        assert_offsets(choice)
    if stream:
        assert [choice["first"] for choice in choices] == [p for p in prompts for _ in range(2)]
    scored = [request.prompt_logprobs for request in sorted(group.requests, key=lambda r: r.choice)]
    assert scored == [1] * 3 + [None] * 3, "each prompt is scored once"


async def test_logprobs_that_json_cannot_say(model_dir: Path) -> None:
    class Certain(FakeGroup):
        async def generate(
            self, request: Generate, take: Take | None = None
        ) -> AsyncIterator[list[TokenDelta]]:
            never = TokenLogprob(-math.inf, [(7, -math.inf)])
            yield [
                TokenDelta(id=request.id, prompt_logprobs=[None] + [never] * (len(request.prompt_ids) - 1))
            ]
            yield [TokenDelta(id=request.id, token_ids=[7], logprobs=[never], finish_reason="length")]

    [choice] = await choices_of(model_dir, Certain(says=[7], info=ready(400)), echo=True, logprobs=1)
    assert set(choice["logprobs"]["token_logprobs"][1:]) == {-9999.0}
    assert all(-9999.0 in top.values() for top in choice["logprobs"]["top_logprobs"][1:])


async def test_prompt_logprobs_as_vllm_has_them(model_dir: Path, group: FakeGroup) -> None:
    [choice] = await choices_of(model_dir, group, prompt_logprobs=2)
    assert (choice["text"], choice["logprobs"]) == (TEXT, None)
    ids = group.requests[0].prompt_ids
    assert choice["prompt_logprobs"][0] is None
    for id, found in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        assert list(found) == [str(id), str(id + 1)]
        assert found[str(id)] == {
            "logprob": HALF,
            "rank": 1,
            "decoded_token": found[str(id)]["decoded_token"],
        }
    [only] = await choices_of(model_dir, group, prompt_logprobs=0, max_tokens=0)
    assert (only["text"], only["finish_reason"]) == ("", "length")
    assert [list(found) for found in only["prompt_logprobs"][1:]] == [[str(id)] for id in ids[1:]]
    assert only["prompt_logprobs"][1][str(ids[1])]["rank"] is None
    [neither] = await choices_of(model_dir, group)
    assert "prompt_logprobs" not in neither


# best_of


class Ranked(FakeGroup):
    """Choice c says the word `words[c]`, each token of it with the log-probability `logprobs[c]`."""

    words: list[list[int]]
    values: list[float]

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        self.requests.append(request)
        assert request.sampling.logprobs is not None, "it cannot be ranked"
        for delta in prompt_deltas(request):
            yield [delta]
        word, value = self.words[request.choice], self.values[request.choice]
        for place, id in enumerate(word):
            end = "length" if place == len(word) - 1 else None
            logprobs = [TokenLogprob(value, [])]
            yield [TokenDelta(id=request.id, token_ids=[id], logprobs=logprobs, finish_reason=end)]


@pytest.fixture
def ranked(model_dir: Path) -> Ranked:
    group = Ranked(says=[], info=ready(400))
    group.words = [ids_of(model_dir, word) for word in ("Hello", "world, how are you", "quick", "lazy dog")]
    group.values = [-0.9, -0.2, -0.5, -0.3]
    return group


async def test_the_best_are_shown_best_first_and_all_are_counted(model_dir: Path, ranked: Ranked) -> None:
    """By the mean: the longest has the lowest sum."""
    response = (await ask(model_dir, ranked, best_of=4, n=2)).json()
    assert [(c["index"], c["text"], c["logprobs"]) for c in response["choices"]] == [
        (0, "world, how are you", None),
        (1, "lazy dog", None),
    ]
    assert len(ranked.requests) == 4
    assert len({request.group for request in ranked.requests}) == 1, "they share their prompt"
    usage = response["usage"]
    assert usage["completion_tokens"] == sum(map(len, ranked.words))
    assert usage["prompt_tokens"] == len(ranked.requests[0].prompt_ids)


async def test_best_of_is_by_prompt_and_ties_keep_their_order(model_dir: Path, ranked: Ranked) -> None:
    ranked.values = [-0.5, -0.5, -0.7, -0.5]
    choices = await choices_of(model_dir, ranked, prompt=["a", "b"], best_of=3, n=2, logprobs=0, echo=True)
    assert [choice["text"] for choice in choices] == [
        p + word for p in "ab" for word in ("Hello", "world, how are you")
    ]
    assert choices[3]["logprobs"]["token_logprobs"][-1] == -0.5


async def test_best_of_the_same_number_draws_no_more(model_dir: Path, group: FakeGroup) -> None:
    await streamed(model_dir, group, best_of=2, n=2)
    assert [request.sampling.logprobs for request in group.requests] == [None, None]


# suffix


@pytest.fixture(scope="module", params=["qwen", "starcoder", "codellama", "deepseek"])
def infilling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    """A model directory whose tokenizer has the tokens, and the tokens."""
    names = {
        "qwen": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"],
        "starcoder": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"],
        "codellama": ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"],
        "deepseek": ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    }[request.param]
    directory = make_model_dir(tmp_path_factory.mktemp("infill"))
    tokenizer = Tokenizers.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory, {name: tokenizer.token_to_id(name) for name in names}


@pytest.mark.parametrize("as_ids", [False, True])
async def test_a_suffix_is_put_where_the_model_was_taught(infilling: tuple[Path, Json], as_ids: bool) -> None:
    directory, tokens = infilling
    group = make_group(directory, "world")
    prefix, suffix = ids_of(directory, "Hello "), ids_of(directory, " today?")
    prompt: object = prefix if as_ids else "Hello "
    [choice] = await choices_of(directory, group, prompt=prompt, suffix=" today?", stop_token_ids=[9])
    assert choice["text"] == "world"
    before, between, after, *ends = tokens.values()
    lead = [] if as_ids else [0]
    assert group.requests[0].prompt_ids == [*lead, before, *prefix, between, *suffix, after]
    assert group.requests[0].stop_token_ids == [9, *ends]


async def test_a_suffix_needs_its_tokens(model_dir: Path, group: FakeGroup) -> None:
    assert infill_of(Tokenizer(model_dir / "tokenizer.json")) is None
    param, message = await refusal(model_dir, group, suffix="x")
    assert param == "suffix"
    assert "no fill-in-the-middle tokens" in message
    [choice] = await choices_of(model_dir, group, suffix="")
    assert choice["text"] == TEXT


# Prompts


async def test_special_tokens_are_added_unless_not_wanted(model_dir: Path, group: FakeGroup) -> None:
    for add in (True, False):
        await ask(model_dir, group, add_special_tokens=add)
    with_them, without = (request.prompt_ids for request in group.requests)
    assert with_them == [0, *without]
    assert without == ids_of(model_dir, PROMPT)


@pytest.mark.parametrize("as_ids", [False, True])
async def test_a_prompt_is_cut_at_its_start(model_dir: Path, group: FakeGroup, as_ids: bool) -> None:
    ids = ids_of(model_dir, PROMPT)
    prompt: object = ids if as_ids else PROMPT
    [choice] = await choices_of(
        model_dir, group, prompt=prompt, truncate_prompt_tokens=4, echo=True, logprobs=0
    )
    kept = ids[-4:] if as_ids else [0, *ids[-3:]]
    assert group.requests[0].prompt_ids == kept
    assert choice["text"].removesuffix(TEXT) == PROMPT[-len(choice["text"].removesuffix(TEXT)) :]
    assert_offsets(choice)
    group.requests.clear()
    await choices_of(model_dir, group, prompt=prompt, truncate_prompt_tokens=1_000)
    assert group.requests[0].prompt_ids == (ids if as_ids else [0, *ids])


async def test_a_prompt_is_cut_to_what_fits(model_dir: Path, group: FakeGroup) -> None:
    assert group.info is not None
    await choices_of(model_dir, group, prompt=[7] * 5_000, truncate_prompt_tokens=-1, max_tokens=12)
    assert len(group.requests[0].prompt_ids) == group.info.max_model_len - 12


# The end of the text


@pytest.mark.parametrize("stream", [False, True])
async def test_what_ended_the_text_is_shown_when_asked_for(
    model_dir: Path, group: FakeGroup, stream: bool
) -> None:
    how = streamed if stream else choices_of
    [choice] = await how(model_dir, group, stop="are", include_stop_str_in_output=True, logprobs=0)
    assert (choice["text"], choice["finish_reason"]) == ("Hello world, how are", "stop")
    assert "".join(choice["logprobs"]["tokens"]) == "Hello world, how are"
    last = group.says[-1]
    group.eos_id, group.says = last, group.says[:-1]
    [ended] = await how(model_dir, group, stop_token_ids=[last], include_stop_str_in_output=True)
    assert (ended["text"], ended["finish_reason"]) == (TEXT, "stop")
    [hidden] = await how(model_dir, group, stop_token_ids=[last])
    assert hidden["text"] != TEXT


# Refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 128, "prompt": ["a"] * 3}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"suffix": "x", "echo": True}, "echo"),
        ({"suffix": "x", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"echo": "yes"}, "echo"),
    ],
)
async def test_refusals_name_the_field(
    model_dir: Path, group: FakeGroup, fields: dict[str, object], param: str
) -> None:
    assert (await refusal(model_dir, group, **fields))[0] == param


@pytest.mark.parametrize(
    ("fields", "bound", "param"),
    [
        ({"echo": True, "n": 5}, "MAX_ECHOED_CHARS", "echo"),
        ({"echo": True, "n": 5, "logprobs": 1}, "MAX_PROMPT_LOGPROBS", "logprobs"),
        ({"prompt_logprobs": 1, "n": 5}, "MAX_PROMPT_LOGPROBS", "prompt_logprobs"),
    ],
)
async def test_what_is_told_of_prompts_is_bounded(
    model_dir: Path,
    group: FakeGroup,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object],
    bound: str,
    param: str,
) -> None:
    monkeypatch.setattr(bounds, bound, 20)
    found, message = await refusal(model_dir, group, **fields)
    assert found == param
    assert "at most 20" in message


async def test_a_group_that_does_not_score_fails_and_does_not_hang(model_dir: Path) -> None:
    class Silent(FakeGroup):
        async def generate(
            self, request: Generate, take: Take | None = None
        ) -> AsyncIterator[list[TokenDelta]]:
            yield [TokenDelta(id=request.id, token_ids=[7], finish_reason="length")]

    silent = Silent(says=[7], info=ready(400))
    response = await ask(model_dir, silent, echo=True, logprobs=1, n=2, max_tokens=1)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


async def test_groups_that_die_while_a_prompt_is_scored(model_dir: Path) -> None:
    """Another replica scores it anew; the answer has everything once."""
    dying = make_group(model_dir, fails_after=2)
    other = make_group(model_dir, name="fake/1")
    async with client_of(make_app(model_dir, dying, other)) as client:
        body = {"model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 1}
        [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert len(dying.requests) == len(other.requests) == 1
    assert choice["text"] == PROMPT + TEXT
    assert len(choice["logprobs"]["tokens"]) == len(dying.requests[0].prompt_ids) + len(other.says) + 1
    assert make_served(model_dir, other).tokenizer_info["eos_token"] == "<|end|>"
