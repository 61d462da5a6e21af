"""/tokenize, /detokenize and /tokenizer_info: what generation would see, and no more than one may."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from gateway.app import create_app
from gateway.settings import Settings
from gateway.workers.protocol import GroupState
from tests.fakes import FakeGroup
from tests.gateway.chat_models import make_chat_app, make_chat_model, scripted
from tests.gateway.serving import client_of, ids_of, make_app, make_served

pytestmark = pytest.mark.anyio
TEXT = "Grüße aus München <|user|>"
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


async def post(model_dir: Path, group: FakeGroup, path: str, **body: Any) -> httpx.Response:
    async with client_of(make_app(model_dir, group)) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_a_text(model_dir: Path, group: FakeGroup, path: str) -> None:
    ids = [0, *ids_of(model_dir, TEXT)]
    answer = await post(model_dir, group, path, model="demo", prompt=TEXT)
    assert group.info is not None
    assert answer.json() == {
        "count": len(ids),
        "max_model_len": group.info.max_model_len,
        "tokens": ids,
        "token_strs": None,
    }
    without = (await post(model_dir, group, path, prompt=TEXT, add_special_tokens=False)).json()
    assert without["tokens"] == ids[1:], "the only model needs no name"
    named = (await post(model_dir, group, path, prompt=TEXT, return_token_strs=True)).json()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert named["token_strs"] == tokenizer.encode(TEXT).tokens
    assert (await post(model_dir, group, path, prompt="", add_special_tokens=False)).json()["count"] == 0


async def test_a_completion_is_made_of_what_tokenize_says(model_dir: Path, group: FakeGroup) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        said = (await client.post("/tokenize", json={"prompt": TEXT})).json()["tokens"]
        await client.post("/v1/completions", json={"model": "demo", "prompt": TEXT})
        chat = {"model": "demo", "messages": MESSAGES[:1]}
        said_of_chat = (await client.post("/tokenize", json=chat)).json()["tokens"]
        await client.post("/v1/chat/completions", json=chat)
    assert [request.prompt_ids for request in group.requests] == [said, said_of_chat]


async def test_a_conversation_with_tools_is_the_chat_s_own(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "hermes", "hermes")
    group = scripted(tmp_path / "hermes", "Sunny.")
    chat = {"model": "demo", "messages": MESSAGES[:1], "tools": [TOOL]}
    async with client_of(make_chat_app(tmp_path / "hermes", group)) as client:
        tokens = (await client.post("/tokenize", json=chat)).json()["tokens"]
        without = (await client.post("/tokenize", json=chat | {"tools": None})).json()["tokens"]
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
    assert group.requests[0].prompt_ids == tokens
    assert len(tokens) > len(without)


async def test_a_conversation(model_dir: Path, group: FakeGroup) -> None:
    async def text_of(**options: object) -> str:
        tokens = (await post(model_dir, group, "/tokenize", messages=MESSAGES, **options)).json()["tokens"]
        return str((await post(model_dir, group, "/detokenize", tokens=tokens)).json()["prompt"])

    turns = "<|begin|><|user|>\nHello<|end|><|assistant|>\nworld"
    assert await text_of() == turns + "<|end|><|assistant|>\n"
    assert await text_of(add_generation_prompt=False) == turns + "<|end|>"
    assert await text_of(continue_final_message=True) == turns
    assert await text_of(add_generation_prompt=False, continue_final_message=True) == turns


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_back_to_text(model_dir: Path, group: FakeGroup, path: str) -> None:
    ids = [0, *ids_of(model_dir, TEXT)]
    assert (await post(model_dir, group, path, tokens=ids)).json() == {"prompt": "<|begin|>" + TEXT}
    assert (await post(model_dir, group, path, tokens=[])).json() == {"prompt": ""}


async def test_large_texts_leave_the_loop_free(
    model_dir: Path, group: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads = []
    real = asyncio.to_thread

    async def to_thread(work, *args, **kwargs):  # type: ignore[no-untyped-def]
        in_threads.append(getattr(work, "__name__", "?"))
        return await real(work, *args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    text = "Hello world " * 2_000
    tokens = (await post(model_dir, group, "/tokenize", prompt=text, add_special_tokens=False)).json()[
        "tokens"
    ]
    assert (await post(model_dir, group, "/detokenize", tokens=tokens)).json() == {"prompt": text}
    assert in_threads == ["encode", "spell"]


async def test_tokenizer_info_is_what_clients_need_to_tokenize_themselves(
    model_dir: Path, group: FakeGroup
) -> None:
    async with client_of(make_app(model_dir, group)) as client:
        info = (await client.get("/tokenizer_info")).json()
        same = (await client.get("/tokenizer_info", params={"model": "org/demo"})).json()
        missing = await client.get("/tokenizer_info", params={"model": "none"})
    assert info == same
    assert (info["bos_token"], info["eos_token"]) == ("<|begin|>", "<|end|>")
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "add_generation_prompt" in info["chat_template"]
    assert missing.status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"messages": MESSAGES, "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"no_such": 1}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "model": ""}, "model"),
    ],
)
async def test_refusals_name_the_field(
    model_dir: Path, group: FakeGroup, body: dict[str, Any], param: str
) -> None:
    response = await post(model_dir, group, "/tokenize", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("tokens", [None, "abc", [-1], [1.5], [True], [2**31], [[1]], [5, 99_999]])
async def test_what_are_no_tokens(model_dir: Path, group: FakeGroup, tokens: object) -> None:
    response = await post(model_dir, group, "/detokenize", tokens=tokens)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"


async def test_several_models_need_a_name(model_dir: Path, group: FakeGroup) -> None:
    served = [make_served(model_dir, group), make_served(model_dir, group, name="two", aliases=())]
    async with client_of(create_app(Settings(), served)) as client:
        response = await client.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 400
        assert "demo, two" in response.json()["error"]["message"]
        assert (await client.post("/tokenize", json={"prompt": "a", "model": "two"})).status_code == 200


async def test_keys_and_limits_are_those_of_every_route(model_dir: Path, group: FakeGroup) -> None:
    settings = Settings(api_keys=("sk-1",), max_body_bytes=1_000)
    async with client_of(make_app(model_dir, group, settings=settings)) as client:
        for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
            assert (await client.request(method, path, json={})).status_code == 401
        headers = {"authorization": "Bearer sk-1"}
        assert (await client.post("/tokenize", json={"prompt": "a"}, headers=headers)).status_code == 200
        large = {"prompt": "a" * 2_000}
        assert (await client.post("/tokenize", json=large, headers=headers)).status_code == 413


async def test_a_model_that_loads_cannot_say_its_length_yet(model_dir: Path, group: FakeGroup) -> None:
    group.state = GroupState.STARTING
    assert (await post(model_dir, group, "/tokenize", prompt="a")).status_code == 503
