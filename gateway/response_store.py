"""Responses that were made, kept in memory for those who made them: so much, and the least used go first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MAX_RESPONSES = 10_000
_OVERHEAD = 1_024  # bytes of objects and indices beside a response's own
_ITEM_OVERHEAD = 256


class ResponseNotFound(LookupError):  # noqa: N818
    """There is none of this id, or no longer, or it is another key's."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PreviousResponseNotFound(ResponseNotFound):
    """The same of a response that another one was to go on with."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """JSON, as it is sent: the response, and the list of items that it was asked with, earlier ones first."""

    response: bytes
    input_items: bytes
    item_ids: tuple[str, ...]  # of these items, and of the response's own

    @property
    def num_bytes(self) -> int:
        items = sum(_ITEM_OVERHEAD + len(id) for id in self.item_ids)
        return _OVERHEAD + len(self.response) + len(self.input_items) + items


@dataclass(slots=True)
class _Shelf:
    """One key's, the least recently used first."""

    responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    by_item: dict[str, str] = field(default_factory=dict)  # the newest response with an item
    num_bytes: int = 0

    def remove(self, id: str) -> None:
        stored = self.responses.pop(id)
        self.num_bytes -= stored.num_bytes
        for item_id in stored.item_ids:
            if self.by_item.get(item_id) == id:
                del self.by_item[item_id]


class ResponseStore:
    """`owner` is the name of the key that asks; nobody finds another's. Who has the most makes room first."""

    def __init__(self, max_bytes: int, max_responses: int = MAX_RESPONSES) -> None:
        self._max_bytes, self._max_responses = max_bytes, max_responses
        self._shelves: dict[str, _Shelf] = {}
        self.num_bytes = 0
        self.num_responses = 0

    @property
    def is_on(self) -> bool:
        return self._max_bytes > 0

    def put(self, owner: str, id: str, stored: StoredResponse) -> bool:
        """Keeps it. False: it alone is larger than all may be."""
        if stored.num_bytes > self._max_bytes:
            return False
        while (
            self.num_bytes + stored.num_bytes > self._max_bytes or self.num_responses >= self._max_responses
        ):
            self._make_room()
        shelf = self._shelves.setdefault(owner, _Shelf())
        shelf.responses[id] = stored
        shelf.by_item.update(dict.fromkeys(stored.item_ids, id))
        shelf.num_bytes += stored.num_bytes
        self.num_bytes += stored.num_bytes
        self.num_responses += 1
        return True

    def get(self, owner: str, id: str) -> StoredResponse:
        """Raises ResponseNotFound."""
        shelf = self._shelf_with(owner, id)
        shelf.responses.move_to_end(id)
        return shelf.responses[id]

    def with_item(self, owner: str, item_id: str) -> StoredResponse | None:
        """One that has this item, if any."""
        shelf = self._shelves.get(owner)
        id = shelf.by_item.get(item_id) if shelf is not None else None
        return None if id is None else self.get(owner, id)

    def delete(self, owner: str, id: str) -> None:
        """Raises ResponseNotFound."""
        self._shelf_with(owner, id)
        self._remove(owner, id)

    def _shelf_with(self, owner: str, id: str) -> _Shelf:
        shelf = self._shelves.get(owner)
        if shelf is None or id not in shelf.responses:
            raise ResponseNotFound(f"Response with id {id[:100]!r} not found.")
        return shelf

    def _make_room(self) -> None:
        owner = max(self._shelves, key=lambda name: self._shelves[name].num_bytes)
        self._remove(owner, next(iter(self._shelves[owner].responses)))

    def _remove(self, owner: str, id: str) -> None:
        shelf = self._shelves[owner]
        num_bytes = shelf.num_bytes
        shelf.remove(id)
        self.num_bytes -= num_bytes - shelf.num_bytes
        self.num_responses -= 1
        if not shelf.responses:
            del self._shelves[owner]
