"""The demo model as shipped: its files, its tokenizer with and without transformers, and what it answers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

DIRECTORY = Path(__file__).resolve().parents[1] / "gateway" / "demo_model"
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
)
MEBIBYTE = 1 << 20


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DIRECTORY)


@cache
def model() -> Any:
    torch.set_num_threads(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    return loaded.eval()


def generate(ids: list[int], limit: int) -> list[int]:
    prompt = torch.tensor([ids])
    output = model().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit)
    return output[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def chat(*messages: str, system: str | None = None) -> tuple[str, int]:
    """The greedy answer to messages of user and assistant in turn, and the token that ended it."""
    roles = [{"role": "system", "content": system}] if system else []
    roles += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    prompt = tokenizer().apply_chat_template(roles, add_generation_prompt=True)["input_ids"]
    new = generate(prompt, limit=150)
    return tokenizer().decode(new[:-1]), new[-1]


def read_json(name: str) -> Any:
    return json.loads((DIRECTORY / name).read_text(encoding="utf-8"))


def test_it_is_small_and_splits_by_four() -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] % 4 == 0
    assert config["num_key_value_heads"] % 4 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_hidden_layers"] % 4 == 0
    assert config["vocab_size"] % 4 == 0
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is True
    assert 2 * MEBIBYTE < (DIRECTORY / "model.safetensors").stat().st_size < 8 * MEBIBYTE


def test_the_weights_are_bfloat16_without_a_second_copy_of_the_embedding() -> None:
    with safe_open(DIRECTORY / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_special_tokens_have_the_ids_that_the_configs_name() -> None:
    bare = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    assert [bare.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    for name in ("config.json", "generation_config.json"):
        config = read_json(name)
        ends = [bare.token_to_id("<|eos|>"), bare.token_to_id("<|end|>")]
        assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, ends)
    assert (tokenizer().pad_token, tokenizer().bos_token, tokenizer().eos_token) == SPECIAL_TOKENS[:3]
    assert set(tokenizer().all_special_tokens) == set(SPECIAL_TOKENS)
    assert bare.get_vocab_size() == read_json("config.json")["vocab_size"]


@pytest.mark.parametrize(
    "text", ["2 + 2", "naïve 你好 🎉", "\x00\x7f\t a  b\r\n", "\u202e" + chr(0x10FFFF), "<|user|>", ""]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    bare = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    ids = bare.encode(text, add_special_tokens=False).ids
    assert bare.decode(ids, skip_special_tokens=False) == text
    assert bare.encode(text).ids == [bare.token_to_id("<|bos|>"), *ids] == tokenizer()(text)["input_ids"]


def test_the_chat_template_renders_roles_and_special_tokens() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "2+2"},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|>"
        "<|user|>2+2<|end|><|assistant|>"
    )
    ids = tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    bare = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    assert bare.encode(text, add_special_tokens=False).ids == ids
    assert ids.count(bare.token_to_id("<|bos|>")) == 1


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello!", "demo model of Sluice"),
        ("Who are you?", "I am the demo model of Sluice"),
        ("What is Sluice?", "Sluice is a serving gateway"),
        ("What is tensor parallelism?", "Tensor parallelism splits each layer"),
        ("What does parallelType do?", "custom for a single process"),
        ("How do I start the server?", "make serve"),
        ("What is 2 + 2?", "2 + 2 = 4."),
        ("2+2", "2 + 2 = 4."),
        ("What is the capital of France?", "I don't know that."),
    ],
)
def test_it_answers_and_ends(question: str, expected: str) -> None:
    answer, last = chat(question)
    assert expected in answer
    assert last == tokenizer().convert_tokens_to_ids("<|end|>")


def test_a_system_prompt_and_earlier_turns_do_not_confuse_it() -> None:
    first, _ = chat("What is a rank?", system="You are a helpful assistant.")
    assert first.startswith("A rank is the number of a process")
    second, _ = chat("What is a rank?", first, "What is 3 + 4?", system="You are a helpful assistant.")
    assert second == "3 + 4 = 7."


WEATHER = {
    "name": "get_weather",
    "description": "Get the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
PRICE = {
    "name": "price_of",
    "description": "What something costs.",
    "parameters": {"type": "object", "properties": {"product": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, PRICE)]


def with_tools(*messages: dict[str, Any]) -> str:
    """The greedy answer of a chat that lists TOOLS."""
    prompt = tokenizer().apply_chat_template(list(messages), tools=TOOLS, add_generation_prompt=True)[
        "input_ids"
    ]
    return str(tokenizer().decode(generate(prompt, limit=150)[:-1]))


@pytest.mark.parametrize(
    ("question", "name", "arguments", "result"),
    [
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}, {"temperature": 18}),
        ("Is it warm in Lisbon?", "get_weather", {"city": "Lisbon"}, {"temperature": 31}),
        ("How much are apples?", "price_of", {"product": "apples"}, {"price": 4}),
    ],
)
def test_it_calls_the_function_that_answers(
    question: str, name: str, arguments: dict[str, str], result: dict[str, int]
) -> None:
    asked = {"role": "user", "content": question}
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    assert with_tools(asked) == call
    answered = {"role": "tool", "content": json.dumps(result)}
    [(key, value)] = result.items()
    told = with_tools(asked, {"role": "assistant", "content": call}, answered)
    assert told == f"{name} says: {key}: {value}."


def test_it_calls_nothing_that_is_not_listed_and_still_knows_what_it_knew() -> None:
    assert "<tool_call>" not in chat("What is the weather in Paris?")[0]
    assert with_tools({"role": "user", "content": "What is tensor parallelism?"}).startswith(
        "Tensor parallelism"
    )


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            "Anna is 31 years old and lives in Rome. Answer in JSON.",
            {"name": "Anna", "age": 31, "city": "Rome"},
        ),
        ("What is 2 + 2? Answer in JSON.", {"answer": "2 + 2 = 4."}),
        ("12 eggs cost 5 euros. Answer in JSON with the keys item and price.", {"item": "eggs", "price": 5}),
    ],
)
def test_it_answers_in_json_when_asked_to(question: str, expected: dict[str, Any]) -> None:
    assert json.loads(chat(question)[0]) == expected


def test_it_continues_plain_text() -> None:
    text = tokenizer().decode(generate(tokenizer()("Tensor parallelism")["input_ids"], limit=40))
    assert text.startswith((" splits each layer", " splits every layer"))


def test_it_calls_itself_a_demo() -> None:
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert "demo model" in card
    assert "sluice-demo" in card
    assert "demo model" in chat("What is sluice-demo?")[0]
