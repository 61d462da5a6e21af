"""The conversation that a response goes on with: what its request says, behind what is stored of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gateway.protocol import bounds
from gateway.protocol.common import InvalidField
from gateway.protocol.responses import ResponseRequest
from gateway.protocol.responses_items import Item
from gateway.protocol.responses_object import ResponseObject, told
from gateway.response_store import (
    PreviousResponseNotFound,
    ResponseNotFound,
    ResponseStore,
    StoredResponse,
)


class _Known(msgspec.Struct):
    id: str


class _Answered(msgspec.Struct):
    output: list[msgspec.Raw]


Listed = tuple[str, msgspec.Raw]
"""An item as it is listed: its id, and all of it as JSON."""


@dataclass(frozen=True, slots=True)
class Context:
    """`listed` has all items, if the response will be stored."""

    items: Sequence[Item]
    listed: Sequence[Listed]
    is_stored: bool


def context_of(store: ResponseStore, owner: str, body: ResponseRequest) -> Context:
    """Raises InvalidField, ResponseNotFound."""
    if not store.is_on:
        _check_without_store(body)
    is_stored = store.is_on and body.store is not False
    before = _before(store, owner, body.previous_response_id)
    items = [_parsed(raw) for _, raw in before]
    listed = list(before) if is_stored else []
    referred = _References(store, owner)
    for place, item in enumerate(body.input or ()):
        known = referred.find(item.id or "", place) if item.kind == "item_reference" else None
        items.append(_parsed(known[1]) if known else item)
        if is_stored:
            listed.append(known or _listed(item))
    if not items:
        raise InvalidField("input", "Invalid value for 'input': expected at least 1 item, not 0.")
    if len(items) > bounds.MAX_MESSAGES:
        raise InvalidField(
            "input", f"The conversation has {len(items)} items; at most {bounds.MAX_MESSAGES} are allowed."
        )
    return Context(items, listed, is_stored)


def stored(response: ResponseObject, context: Context) -> StoredResponse:
    """What is kept of a response that has ended."""
    ids = [id for id, _ in context.listed] + [item.id for item in response.output]
    input_items = msgspec.json.encode([raw for _, raw in context.listed])
    return StoredResponse(msgspec.json.encode(response), input_items, tuple(ids))


def listed_items(stored: StoredResponse) -> list[Listed]:
    """The input's."""
    return _with_ids(msgspec.json.decode(stored.input_items, type=list[msgspec.Raw]))


def _check_without_store(body: ResponseRequest) -> None:
    why = "this server keeps no responses (--response-store-bytes is 0)"
    if body.store:
        raise InvalidField("store", f"'store' cannot be true: {why}.")
    if body.previous_response_id is not None:
        raise InvalidField(
            "previous_response_id",
            f"'previous_response_id' cannot be found: {why}. Send the earlier items in 'input'.",
        )


def _before(store: ResponseStore, owner: str, id: str | None) -> list[Listed]:
    if id is None:
        return []
    try:
        return _all_items(store.get(owner, id))
    except ResponseNotFound as error:
        raise PreviousResponseNotFound(
            f"Previous response with id '{id[:100]}' not found: it was not stored, or is not any longer."
            " Send the earlier items in 'input'.",
            "previous_response_id",
        ) from error


class _References:
    """Items that are referred to by their ids."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store, self._owner = store, owner
        self._found: dict[str, msgspec.Raw] = {}

    def find(self, id: str, place: int) -> Listed:
        if id not in self._found:
            response = self._store.with_item(self._owner, id)
            if response is None:
                raise ResponseNotFound(
                    f"Item with id '{id[:100]}' not found: it was not stored, or is not any longer."
                    " Send the item itself.",
                    f"input[{place}].id",
                )
            self._found |= dict(_all_items(response))
        return id, self._found[id]


def _all_items(stored: StoredResponse) -> list[Listed]:
    """The input's and the output's."""
    answered = msgspec.json.decode(stored.response, type=_Answered)
    return listed_items(stored) + _with_ids(answered.output)


def _with_ids(items: list[msgspec.Raw]) -> list[Listed]:
    return [(msgspec.json.decode(item, type=_Known).id, item) for item in items]


def _listed(item: Item) -> Listed:
    as_told = told(item)
    return as_told.id, msgspec.Raw(msgspec.json.encode(as_told))


def _parsed(item: msgspec.Raw) -> Item:
    return Item.model_validate(msgspec.json.decode(item))
