"""POST /tokenize, POST /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.conversation import chat_prompt
from gateway.prompts import require_ready
from gateway.protocol.common import InvalidField, parse_body
from gateway.protocol.tokenize import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from gateway.router import ServedModel
from gateway.routes.chat_start import conversation_of
from gateway.routes.common import gateway_of, json_response
from gateway.sequences import require_known_ids

router = APIRouter()


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    body = parse_body(await request.body(), TokenizeRequest)
    model = _model(request, body.model)
    max_model_len = require_ready(model).max_model_len
    ids = await _ids(model, body)
    names = [model.tokenizer.name_of(id) for id in ids] if body.return_token_strs else None
    return json_response(Tokenized(len(ids), max_model_len, ids, names))


async def _ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        assert body.prompt is not None, "it is one of two"
        add = body.add_special_tokens is not False
        return await model.tokenizer.encode_async(body.prompt, add_special_tokens=add)
    chat = body.as_chat(model.name)
    return (await chat_prompt(model, conversation_of(model, chat, chat.tool_use()))).ids


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """Control tokens are written out."""
    body = parse_body(await request.body(), DetokenizeRequest)
    model = _model(request, body.model)
    require_known_ids("tokens", body.tokens, require_ready(model).vocab_size)
    return json_response(Detokenized(await model.tokenizer.spell_async(body.tokens)))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    model = _model(request, request.query_params.get("model"))
    return Response(msgspec.json.encode(model.tokenizer_info), media_type="application/json")


def _model(request: Request, name: str | None) -> ServedModel:
    """Raises ModelNotFound, InvalidField."""
    router = gateway_of(request).router
    if name is not None:
        return router.find(name)
    if len(router.models) > 1:
        names = ", ".join(model.name for model in router.models)
        raise InvalidField("model", f"Several models are served; 'model' says which: {names}")
    return router.models[0]
