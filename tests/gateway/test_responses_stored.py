"""Responses that are kept: to go on with, to look at and to delete; by whom they belong to, within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import ResponseItemList

from gateway.app import create_app
from gateway.response_store import (
    ResponseNotFound,
    ResponseStore,
    StoredResponse,
)
from gateway.settings import Settings
from tests.gateway.chat_models import Scripted, make_chat_model, scripted, serving_chat
from tests.gateway.serving import listening, make_served
from tests.gateway.test_responses import sdk


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), "plain")


@pytest.fixture
def group(model: Path) -> Scripted:
    return scripted(model, "One.", "Two.", "Three.")


@pytest.fixture
def client(model: Path, group: Scripted) -> Iterator[OpenAI]:
    with serving_chat(model, group) as url, sdk(url) as client:
        yield client


def test_a_conversation_goes_on_by_ids(client: OpenAI, group: Scripted) -> None:
    first = client.responses.create(model="demo", input="a", instructions="Be brief.")
    second = client.responses.create(model="demo", input="b", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    for event in client.responses.create(
        model="demo", input="c", previous_response_id=second.id, instructions="Be kind.", stream=True
    ):
        if event.type == "response.completed":
            third = event.response
    turns = "<|user|>a<|end|><|assistant|>One.<|end|><|user|>b<|end|>"
    assert group.prompt(1) == f"{turns}<|assistant|>", "instructions are not carried over"
    assert group.prompt(2) == (
        f"<|system|>Be kind.<|end|>{turns}<|assistant|>Two.<|end|><|user|>c<|end|><|assistant|>"
    )
    client.responses.create(model="demo", input="d", previous_response_id=first.id)  # another branch
    assert group.prompt(3) == ("<|user|>a<|end|><|assistant|>One.<|end|><|user|>d<|end|><|assistant|>")
    items = client.responses.input_items.list(third.id, order="asc").data
    assert [item.role for item in items if item.type == "message"] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]


def test_an_item_may_be_referred_to(client: OpenAI, group: Scripted) -> None:
    first = client.responses.create(model="demo", input="a")
    item: Any = {"type": "item_reference", "id": first.output[0].id}
    question: Any = {"role": "user", "content": "b"}
    second = client.responses.create(model="demo", input=[question, item, question])
    assert group.prompt() == ("<|user|>b<|end|><|assistant|>One.<|end|><|user|>b<|end|><|assistant|>")
    items = client.responses.input_items.list(second.id).data
    assert items[1].id == first.output[0].id


def metrics_of(client: OpenAI) -> list[str]:
    return httpx.get(str(client.base_url.join("/metrics"))).text.splitlines()


def test_get_and_delete(client: OpenAI) -> None:
    made = client.responses.create(model="demo", input="a", metadata={"b": "c"})
    assert client.responses.retrieve(made.id) == made
    with pytest.raises(openai.BadRequestError, match="not streamed again"):
        client.responses.retrieve(made.id, stream=True)
    assert "sluice:responses_stored 1.0" in metrics_of(client)
    client.responses.delete(made.id)
    assert "sluice:responses_stored_bytes 0.0" in metrics_of(client)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match=f"Response with id '{made.id}' not found"):
            ask(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="demo", input="b", previous_response_id=made.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_stored_is_not(client: OpenAI) -> None:
    made = client.responses.create(model="demo", input="a", store=False)
    assert made.model_extra == {"store": False}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_input_items_come_in_pages(client: OpenAI) -> None:
    given: Any = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": "b", "id": "msg_own"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "c"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "d"},
        {"role": "developer", "content": [{"type": "input_text", "text": "e"}]},
    ]
    made = client.responses.create(model="demo", input=given)
    url = f"{client.base_url}responses/{made.id}/input_items"
    whole = httpx.get(url, params={"order": "asc"})
    found = ResponseItemList.model_validate_json(whole.content, strict=True)
    assert [item.type for item in found.data] == [item.get("type", "message") for item in given]
    assert found.data[1].id == "msg_own"
    ids = [item.id for item in found.data]
    assert len(set(ids)) == 6
    assert (found.first_id, found.last_id, found.has_more) == (ids[0], ids[-1], False)
    pages = client.responses.input_items.list(made.id, limit=4)
    assert [item.id for item in pages.data] == ids[:1:-1]
    assert [item.id for item in pages] == ids[::-1], "the SDK goes on with the next page"
    for params in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "x"}):
        response = httpx.get(url, params=params)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(params))


def test_another_key_s_responses_are_not_found(model: Path, group: Scripted) -> None:
    settings = Settings(api_keys=("sk-first", "sk-second"))
    with (
        listening(create_app(settings, [make_served(model, group)])) as url,
        sdk(f"{url}/v1") as client,
    ):
        first, second = (client.with_options(api_key=key) for key in settings.api_keys)
        made = first.responses.create(model="demo", input="a")
        for ask in (second.responses.retrieve, second.responses.delete, second.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.BadRequestError):
            second.responses.create(model="demo", input="b", previous_response_id=made.id)
        reference: Any = [{"type": "item_reference", "id": made.output[0].id}]
        with pytest.raises(openai.NotFoundError):
            second.responses.create(model="demo", input=reference)
        assert first.responses.retrieve(made.id) == made
    assert len(group.requests) == 1


def test_a_server_that_keeps_none_says_so(model: Path, group: Scripted) -> None:
    app = create_app(Settings(response_store_bytes=0), [make_served(model, group)])
    with listening(app) as url, sdk(f"{url}/v1") as client:
        made = client.responses.create(model="demo", input="a")
        assert made.model_extra == {"store": False}
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)
        for fields in ({"store": True}, {"previous_response_id": made.id}):
            with pytest.raises(openai.BadRequestError, match="keeps no responses") as caught:
                client.responses.create(model="demo", input="b", **fields)  # type: ignore[call-overload]
            assert caught.value.param == next(iter(fields))
    with pytest.raises(ValueError, match="response_store_bytes"):
        Settings(response_store_bytes=-1)


def test_one_that_is_too_large_to_be_kept_says_so(model: Path, group: Scripted) -> None:
    app = create_app(Settings(response_store_bytes=10), [make_served(model, group)])
    with listening(app) as url, sdk(f"{url}/v1") as client:
        made = client.responses.create(model="demo", input="a", store=True)
        assert made.model_extra == {"store": False}
        last = list(client.responses.create(model="demo", input="a", stream=True))[-1]
        assert last.type == "response.completed"
        assert last.response.model_extra == {"store": False}
        for response in (made, last.response):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(response.id)


def kept(num_bytes: int, *item_ids: str) -> StoredResponse:
    """One that counts as so many bytes."""
    least = StoredResponse(b"", b"", item_ids).num_bytes
    return StoredResponse(b"x" * (num_bytes - least), b"", item_ids)


def has(store: ResponseStore, owner: str, id: str) -> bool:
    try:
        store.get(owner, id)
    except ResponseNotFound:
        return False
    return True


def test_the_store_is_bounded_in_bytes_and_the_least_used_go_first() -> None:
    store = ResponseStore(30_000)
    for number in range(3):
        store.put("a", f"r{number}", kept(10_000, f"i{number}"))
    assert store.num_bytes == 30_000
    store.get("a", "r0")
    assert store.with_item("a", "i1") == kept(10_000, "i1")
    store.put("a", "r3", kept(10_000))
    assert [has(store, "a", f"r{number}") for number in range(4)] == [True, True, False, True]
    assert store.with_item("a", "i2") is None
    store.put("a", "large", kept(30_001))
    assert not has(store, "a", "large")
    assert (store.num_bytes, store.num_responses) == (30_000, 3)
    store.put("a", "whole", kept(30_000))
    assert (store.num_bytes, store.num_responses) == (30_000, 1)
    store.delete("a", "whole")
    assert (store.num_bytes, store.num_responses) == (0, 0)


def test_the_store_is_bounded_in_number() -> None:
    store = ResponseStore(1 << 30, max_responses=5)
    for number in range(100):
        store.put(f"owner{number % 7}", f"r{number}", kept(2_000))
    assert store.num_responses == 5
    assert store.num_bytes == 5 * 2_000


def test_who_stores_much_takes_no_room_of_others() -> None:
    store = ResponseStore(100_000)
    store.put("light", "r", kept(10_000, "i"))
    for number in range(100):
        store.put("heavy", f"r{number}", kept(10_000, f"i{number}"))
    assert has(store, "light", "r")
    assert store.with_item("light", "i") is not None
    assert store.with_item("light", "i99") is None
    assert sum(has(store, "heavy", f"r{number}") for number in range(100)) == 9


def test_an_item_is_found_while_its_newest_response_is_there() -> None:
    store = ResponseStore(100_000)
    store.put("a", "old", kept(10_000, "i"))
    store.put("a", "new", kept(20_000, "i"))
    assert store.with_item("a", "i") == kept(20_000, "i")
    store.delete("a", "old")
    assert store.with_item("a", "i") == kept(20_000, "i")
