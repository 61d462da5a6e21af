"""OpenAI's own SDK against the real server: synchronous and not, streaming and not."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import AutoModel

from tests.e2e.server import MODEL, Server

DEMO = Path(__file__).parents[2] / "gateway" / "demo_model"
QUESTIONS = ["What is Sluice?", "What is tensor parallelism?", "What is 3 + 4?", "Hello!"]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(question: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": question}]


def answer(client: openai.OpenAI, question: str) -> str:
    response = client.chat.completions.create(
        model=MODEL, messages=ask(question), temperature=0, max_tokens=48
    )
    assert response.choices[0].message.content is not None
    return response.choices[0].message.content


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_answers_with_usage(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model=MODEL, messages=ask("Hello!"), temperature=0, max_completion_tokens=64
    )
    assert response.usage is not None
    assert response.object == "chat.completion"
    assert response.choices[0].finish_reason in ("stop", "length")
    assert response.choices[0].message.role == "assistant"
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
    assert 1 <= response.usage.completion_tokens <= 64


def test_streamed_chat_gives_the_same_text_as_whole_chat(client: openai.OpenAI) -> None:
    for question in QUESTIONS:
        whole = answer(client, question)
        stream = client.chat.completions.create(
            model=MODEL,
            messages=ask(question),
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
        assert chunks[-1].usage is not None
        assert chunks[-1].choices == []
        assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.anyio
async def test_concurrent_streams_give_what_each_gives_alone(server: Server, client: openai.OpenAI) -> None:
    alone = [answer(client, question) for question in QUESTIONS]

    async def stream(client: openai.AsyncOpenAI, question: str) -> str:
        chunks = await client.chat.completions.create(
            model=MODEL, messages=ask(question), temperature=0, max_tokens=48, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as aclient:
        together = await asyncio.gather(*(stream(aclient, question) for question in QUESTIONS * 3))
    assert together == alone * 3


@pytest.mark.anyio
async def test_async_completion(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        response = await client.completions.create(
            model=MODEL, prompt="Sluice is", max_tokens=8, temperature=0
        )
    assert response.choices[0].text


def test_completion_prompts_in_all_four_forms(client: openai.OpenAI) -> None:
    prompts: list[str | list[str] | list[int] | list[list[int]]] = [
        "Hello",
        ["Hello", "Sluice"],
        [20, 21, 22],
        [[20, 21, 22], [30, 31]],
    ]
    for prompt, count in zip(prompts, (1, 2, 1, 2), strict=True):
        response = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in response.choices] == list(range(count))
        assert response.usage is not None
        assert response.usage.completion_tokens == 5 * count


def test_choices_are_seeded(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        response = client.completions.create(
            model=MODEL, prompt="What", n=3, max_tokens=12, temperature=1.5, seed=seed
        )
        return [choice.text for choice in sorted(response.choices, key=lambda choice: choice.index)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) > 1  # the choices of one request differ


def test_no_part_of_a_stop_string_is_shown(client: openai.OpenAI) -> None:
    whole = answer(client, QUESTIONS[0])
    stop = whole[4:9]
    cut = whole[: whole.index(stop)]
    response = client.chat.completions.create(
        model=MODEL, messages=ask(QUESTIONS[0]), temperature=0, max_tokens=48, stop=[stop]
    )
    assert response.choices[0].message.content == cut
    assert response.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=MODEL, messages=ask(QUESTIONS[0]), temperature=0, max_tokens=48, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut


def test_logprobs(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model=MODEL, messages=ask("Hello!"), temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0  # greedy: the likeliest


def test_errors_are_the_sdk_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=ask("hi"))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[20] * 100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as hot:
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert hot.value.param == "temperature"


def test_responses_answer_as_chats_do_and_go_on_by_ids(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=QUESTIONS[0], temperature=0, max_output_tokens=48)
    assert first.output_text == answer(client, QUESTIONS[0])
    said = [*ask(QUESTIONS[0]), {"role": "assistant", "content": first.output_text}, *ask(QUESTIONS[2])]
    chat = client.chat.completions.create(model=MODEL, messages=said, temperature=0, max_tokens=48)  # type: ignore[arg-type]
    with client.responses.stream(
        model=MODEL,
        input=QUESTIONS[2],
        previous_response_id=first.id,
        temperature=0,
        max_output_tokens=48,
    ) as stream:
        second = stream.get_final_response()
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    assert chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0


class Sum(BaseModel):
    a: Literal[1, 2]
    b: Literal[3, 4]


def test_a_response_is_of_its_schema_at_any_temperature(client: openai.OpenAI) -> None:
    for temperature in (0.0, 2.0):
        response = client.responses.parse(
            model=MODEL, input=QUESTIONS[2], text_format=Sum, temperature=temperature, max_output_tokens=400
        )
        assert response.status == "completed"
        assert isinstance(response.output_parsed, Sum)


TEXTS = ["What is Sluice?", "A sum: 3 + 4", "Ein längerer Text, dessen Wörter das Modell nicht kennt. " * 40]


@torch.inference_mode()
def test_embeddings_are_transformers_hidden_states(client: openai.OpenAI) -> None:
    """The demo model's, in float32, averaged; the SDK asks for base64 by itself."""
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    few = client.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=8, encoding_format="float")
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    model = AutoModel.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    for one, prompt in zip(answer.data, ids, strict=True):
        expected = model(torch.tensor([prompt])).last_hidden_state[0].double().mean(0)
        found = torch.tensor(one.embedding).double()
        assert (found - expected / expected.norm()).abs().max().item() < 1e-5
    start = torch.tensor(answer.data[0].embedding[:8])
    assert few.data[0].embedding == pytest.approx((start / start.norm()).tolist(), abs=1e-6)


def test_embeddings_beside_chats_change_nothing(client: openai.OpenAI) -> None:
    alone = [answer(client, question) for question in QUESTIONS]
    vectors = [one.embedding for one in client.embeddings.create(model=MODEL, input=TEXTS).data]
    with ThreadPoolExecutor() as pool:
        embedding = [pool.submit(client.embeddings.create, model=MODEL, input=TEXTS * 4) for _ in range(2)]
        chats = list(pool.map(lambda question: answer(client, question), QUESTIONS))
    assert chats == alone
    for future in embedding:
        found = torch.tensor([one.embedding for one in future.result().data])
        assert (found - torch.tensor(vectors * 4)).abs().max().item() < 1e-5


def test_what_cannot_be_embedded_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model=MODEL, input=["a", ""])
    assert empty.value.param == "input[1]"
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model=MODEL, input=["a", "one two three " * 2_000])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input[1]")
    with pytest.raises(openai.BadRequestError) as wide:
        client.embeddings.create(model=MODEL, input="a", dimensions=100_000)
    assert wide.value.param == "dimensions"
