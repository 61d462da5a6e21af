"""GET /v1/models and /v1/models/{id}; an id may have slashes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.protocol.models import Model, ModelList
from gateway.router import ServedModel
from gateway.routes.common import gateway_of, json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Every name of every model, loaded or not."""
    models = gateway_of(request).router.models
    return json_response(ModelList(data=[_model(model, name) for model in models for name in model.names]))


@router.get("/v1/models/{id:path}")
async def get_model(request: Request, id: str) -> Response:
    return json_response(_model(gateway_of(request).router.find(id), id))


def _model(model: ServedModel, name: str) -> Model:
    return Model(id=name, created=model.created, owned_by=model.owned_by)
