"""GET and DELETE /v1/responses/{id}, GET /v1/responses/{id}/input_items: what is kept of a response."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.protocol.common import InvalidField
from gateway.protocol.responses_object import ItemList, ResponseDeleted
from gateway.response_store import StoredResponse
from gateway.routes.common import gateway_of, json_response, tenant_of
from gateway.routes.responses_context import listed_items

router = APIRouter()

DEFAULT_ITEMS, MAX_ITEMS = 20, 100


@router.get("/v1/responses/{id}")
async def get_response(request: Request, id: str) -> Response:
    stored = _stored(request, id)
    if request.query_params.get("stream") == "true":
        raise InvalidField("stream", "A stored response is not streamed again: ask without 'stream'.")
    return Response(stored.response, media_type="application/json")


@router.delete("/v1/responses/{id}")
async def delete_response(request: Request, id: str) -> Response:
    gateway_of(request).responses.delete(tenant_of(request).name, id)
    return json_response(ResponseDeleted(id))


@router.get("/v1/responses/{id}/input_items")
async def list_input_items(request: Request, id: str) -> Response:
    """A page of them, newest first unless `order` is asc; `after`: the last id of the page before."""
    items = listed_items(_stored(request, id))
    order, after = request.query_params.get("order", "desc"), request.query_params.get("after")
    if order not in ("asc", "desc"):
        raise InvalidField("order", "'order' must be 'asc' or 'desc'.")
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item_id for item_id, _ in items]
        if after not in ids:
            raise InvalidField("after", "'after' must be the id of an item of this response.")
        items = items[ids.index(after) + 1 :]
    page = items[: _limit(request.query_params.get("limit"))]
    return json_response(
        ItemList(
            data=[raw for _, raw in page],
            first_id=page[0][0] if page else None,
            last_id=page[-1][0] if page else None,
            has_more=len(page) < len(items),
        )
    )


def _limit(given: str | None) -> int:
    if given is None:
        return DEFAULT_ITEMS
    if not (given.isascii() and given.isdigit() and len(given) < 4 and 1 <= int(given) <= MAX_ITEMS):
        raise InvalidField("limit", f"'limit' must be a whole number from 1 to {MAX_ITEMS}.")
    return int(given)


def _stored(request: Request, id: str) -> StoredResponse:
    return gateway_of(request).responses.get(tenant_of(request).name, id)
