"""Log-likelihoods as lm-eval asks for them, and echo by OpenAI's SDK: beside transformers itself."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import openai
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.e2e.server import MODEL, Server
from tests.test_demo_model import DIRECTORY as DEMO_MODEL

PAIRS = [
    ("What is Sluice?", " Sluice is a serving gateway"),
    ("Hello!", " Hello! I am the demo model of Sluice."),
    ("What is tensor parallelism?", " Bananas"),
    ("3 + 4 is", " 7"),
    ("Ein Gruß: Grüße aus München", " und 日本"),
]
Scored = tuple[float, bool]


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@torch.inference_mode()
def log_softmax(reference: torch.nn.Module, ids: list[int]) -> Tensor:
    """[T, V]: row t is of the token after ids[t]."""
    expected: Tensor = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    return expected


def direct(reference: torch.nn.Module, context: list[int], continuation: list[int]) -> Scored:
    """The log-likelihood of a continuation, and whether greedy decoding would have written it."""
    rows = log_softmax(reference, context + continuation)[len(context) - 1 : -1]
    own = rows.gather(1, torch.tensor(continuation).unsqueeze(1))
    return own.sum().item(), rows.argmax(-1).tolist() == continuation


def tokenize(server: Server, text: str, *, start: bool) -> list[int]:
    """By the server's own /tokenize, as lm-eval's remote tokenizer does."""
    response = server.client.post("/tokenize", json={"prompt": text, "add_special_tokens": start})
    return list(response.json()["tokens"])


def parse_logprobs(answer: dict[str, Any], context_lengths: list[int]) -> list[Scored]:
    """As lm-eval's LocalCompletionsAPI reads an answer: the last token is the generated one."""
    scored = []
    choices = sorted(answer["choices"], key=itemgetter("index"))
    for choice, length in zip(choices, context_lengths, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        scored.append((sum(values), is_greedy))
    return scored


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_loglikelihoods_as_lm_eval_asks_for_them(
    server: Server, reference: torch.nn.Module, batch_size: int
) -> None:
    pairs = [(tokenize(server, a, start=True), tokenize(server, b, start=False)) for a, b in PAIRS]
    pairs.append((pairs[0][0], greedy(reference, pairs[0][0], 8)))
    expected = [direct(reference, *pair) for pair in pairs]
    found: list[Scored] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        request = {
            "model": MODEL,
            "prompt": [context + continuation for context, continuation in batch],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        response = server.client.post("/v1/completions", json=request)
        assert response.status_code == 200, response.text
        found += parse_logprobs(response.json(), [len(context) for context, _ in batch])
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert {is_greedy for _, is_greedy in found} == {True, False}


def greedy(reference: torch.nn.Module, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(log_softmax(reference, ids)[-1].argmax()))
    return ids[len(context) :]


def test_the_answer_s_end_is_a_token_like_the_others(server: Server, reference: torch.nn.Module) -> None:
    """lm-eval drops the last token, the generated one: it must be there even if it ends the answer."""
    rendered = {"messages": [{"role": "user", "content": "What is Sluice?"}], "model": MODEL}
    prompt = server.client.post("/tokenize", json=rendered).json()["tokens"]
    whole = prompt + greedy(reference, prompt, 60)
    for length in range(len(prompt) + 1, len(whole)):
        if whole[length] in server_eos(server):
            break
    else:
        pytest.fail("the demo model ends its answer")
    body = {
        "model": MODEL,
        "prompt": whole[:length],
        "echo": True,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
    }
    (choice,) = server.client.post("/v1/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == length + 1
    assert choice["logprobs"]["token_logprobs"][-1] == max(choice["logprobs"]["top_logprobs"][-1].values())


def server_eos(server: Server) -> list[int]:
    """The ids at which the demo model's answers end."""
    return [tokenize(server, text, start=False)[0] for text in ("<|end|>", "<|eos|>")]


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echo_with_logprobs_is_transformers_log_softmax(
    client: openai.OpenAI, server: Server, reference: torch.nn.Module, max_tokens: int
) -> None:
    for text, _ in PAIRS:
        answer = client.completions.create(
            model=MODEL, prompt=text, echo=True, logprobs=5, max_tokens=max_tokens, temperature=0
        )
        (choice,) = answer.choices
        assert choice.text.startswith(text)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        ids = tokenize(server, text, start=True)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(ids)
        expected = log_softmax(reference, ids)
        own = [expected[place - 1, ids[place]].item() for place in range(1, len(ids))]
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
        for place in range(1, len(ids)):
            likeliest = expected[place - 1].topk(5).values.tolist()
            found = sorted(logprobs.top_logprobs[place].values(), reverse=True)
            assert found[: len(likeliest)] == pytest.approx(likeliest, abs=1e-4)
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert choice.text[offset : offset + len(token)] == token


def test_the_best_of_many_is_the_likeliest(client: openai.OpenAI) -> None:
    """All of the draws one by one, and the best: the same seed draws the same."""
    how: dict[str, Any] = {
        "model": MODEL,
        "prompt": "What is",
        "max_tokens": 12,
        "temperature": 1.5,
        "seed": 11,
    }
    drawn = client.completions.create(n=6, logprobs=0, **how)
    means = []
    for choice in drawn.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        means.append(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))
    ranked = sorted(range(6), key=lambda index: means[index], reverse=True)
    best = client.completions.create(best_of=6, n=3, **how)
    assert [choice.text for choice in best.choices] == [drawn.choices[index].text for index in ranked[:3]]
    assert [choice.index for choice in best.choices] == [0, 1, 2]
    assert best.usage is not None
    assert drawn.usage is not None
    assert best.usage == drawn.usage, "all that was drawn is counted"


def test_streamed_batches_are_what_whole_ones_are(client: openai.OpenAI) -> None:
    how: dict[str, Any] = {
        "model": MODEL, "prompt": [text for text, _ in PAIRS], "n": 2, "echo": True, "logprobs": 2,
        "max_tokens": 5, "temperature": 1.0, "seed": 3,
    }  # fmt: skip
    whole = client.completions.create(**how)
    texts = [""] * len(whole.choices)
    values: list[list[float | None]] = [[] for _ in texts]
    offsets: list[list[int]] = [[] for _ in texts]
    for chunk in client.completions.create(stream=True, **how):
        for choice in chunk.choices:
            if not texts[choice.index]:
                assert choice.text == PAIRS[choice.index // 2][0], "the prompt is the first chunk"
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                values[choice.index] += choice.logprobs.token_logprobs or []
                offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [choice.text for choice in whole.choices]
    for index, choice in enumerate(whole.choices):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert offsets[index] == choice.logprobs.text_offset
        assert values[index][0] is None
        assert values[index][1:] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)
