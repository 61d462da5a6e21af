"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.embedding import Embedding, require_pooling
from gateway.prompts import Encoding, completion_prompts, require_ready
from gateway.protocol.common import parse_body
from gateway.protocol.embeddings import EmbeddingsRequest, embeddings
from gateway.routes.common import gateway_of, tenant_of
from gateway.sse import unless_gone

router = APIRouter()
LARGE_VECTORS = 256 << 10
"""From so many bytes on they are written in a thread: some milliseconds on the event loop."""


@router.post("/v1/embeddings")
async def create_embeddings(request: Request) -> Response:
    gateway = gateway_of(request)
    body = parse_body(await request.body(), EmbeddingsRequest)
    model = gateway.router.find(body.model)
    pooling = require_pooling(model, gateway.router)
    encoding = Encoding(
        add_special_tokens=body.add_special_tokens is not False,
        max_tokens=body.max_tokens(require_ready(model).max_model_len),
    )
    prompts = [prompt.ids for prompt in await completion_prompts(model.tokenizer, body.input, encoding)]
    admission = gateway.admissions[model.name]
    embedding = Embedding(admission, prompts, pooling, body.dimensions, tenant_of(request))
    vectors = await unless_gone(request.receive, embedding.vectors())

    def write() -> bytes:
        format = body.encoding_format or "float"
        return msgspec.json.encode(embeddings(vectors, format, body.model, embedding.num_prompt_tokens))

    is_large = sum(map(len, vectors)) >= LARGE_VECTORS
    content = await asyncio.to_thread(write) if is_large else write()
    return Response(content, media_type="application/json")
