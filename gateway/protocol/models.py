"""GET /v1/models and /v1/models/{id}: OpenAI's fields and Anthropic's, whoever asks."""

from __future__ import annotations

from typing import Literal

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str
    type: Literal["model"] = "model"
    display_name: str
    created_at: str  # as RFC 3339
    lifecycle: Literal["active"] = "active"


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All of them: there is no next page."""

    object: str = "list"
    data: list[Model]
    first_id: str
    last_id: str
    has_more: bool = False
