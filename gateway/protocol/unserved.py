"""Endpoints that clients know of and that are not served, with the reason."""

from __future__ import annotations

_TEXT_ONLY = "the models read and write text only"
_NOTHING_KEPT = "the server keeps no files, and no work for later"
_NO_SCORES = "no model is served that scores pairs of texts; compare the vectors of /v1/embeddings"
_ASSISTANTS = "use /v1/responses, or send the conversation to /v1/chat/completions"

UNSERVED = {
    "/v1/responses/input_tokens": "/tokenize counts the tokens of a prompt or a conversation",
    "/v1/responses/compact": "nothing is compacted: send what shall be remembered in 'input'",
    "/v1/responses/{id}/cancel": "no response is made in the background: closing the connection stops one",
    "/v1/rerank": _NO_SCORES,
    "/v1/score": _NO_SCORES,
    "/v1/moderations": "the server does not moderate",
    "/v1/audio": _TEXT_ONLY,
    "/v1/images": _TEXT_ONLY,
    "/v1/videos": _TEXT_ONLY,
    "/v1/realtime": "answers come over HTTP, as server-sent events",
    "/v1/files": _NOTHING_KEPT,
    "/v1/uploads": _NOTHING_KEPT,
    "/v1/batches": _NOTHING_KEPT,
    "/v1/messages/batches": _NOTHING_KEPT,
    "/v1/vector_stores": _NOTHING_KEPT,
    "/v1/assistants": _ASSISTANTS,
    "/v1/threads": _ASSISTANTS,
    "/v1/conversations": _ASSISTANTS,
    "/v1/complete": "use /v1/completions or /v1/messages",
    "/v1/fine_tuning": "the server trains nothing",
}
"""With what is under them."""


def why_unserved(path: str) -> str | None:
    """None: nobody knows of such an endpoint."""
    steps = path.split("/")
    return next((why for known, why in UNSERVED.items() if _leads_to(known.split("/"), steps)), None)


def _leads_to(known: list[str], steps: list[str]) -> bool:
    return len(known) <= len(steps) and all(
        one in (step, "{id}") for one, step in zip(known, steps, strict=False)
    )
