"""/livez, /readyz, /health and /metrics: for probes, of which some ask by HEAD, and for dashboards."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.metrics import CONTENT_TYPE
from gateway.router import GroupStatus
from gateway.routes.common import Gateway, gateway_of, json_response

router = APIRouter()


class GroupHealth(msgspec.Struct, frozen=True):
    """`phase`, and `percent` of the whole start, while it loads."""

    name: str
    state: str
    phase: str | None
    percent: int | None
    restarts: int
    failure: str | msgspec.UnsetType | None = msgspec.UNSET


class ModelHealth(msgspec.Struct, frozen=True):
    model: str
    ready: bool
    groups: list[GroupHealth]


class Health(msgspec.Struct, frozen=True):
    status: str
    models: list[ModelHealth] | msgspec.UnsetType = msgspec.UNSET


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def live() -> Response:
    """The process answers."""
    return json_response(Health("ok"))


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def ready(request: Request) -> Response:
    """200 when every model has a ready group, else 503. Open to all, so it does not say why one failed."""
    return _health(gateway_of(request), with_failures=False)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """As /readyz; with the reasons where there are no keys. They name paths of the server: they are for who
    runs it, not for everybody who holds a key (`sluice admin status`)."""
    gateway = gateway_of(request)
    return _health(gateway, with_failures=gateway.keys.is_open)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(gateway_of(request).metrics.exposition(), headers={"content-type": CONTENT_TYPE})


def _health(gateway: Gateway, *, with_failures: bool) -> Response:
    models = [
        ModelHealth(
            model.name, model.is_ready, [_group(status, with_failures) for status in model.statuses()]
        )
        for model in gateway.router.models
    ]
    is_ready = all(model.ready for model in models)
    is_draining = any(model.is_draining for model in gateway.router.models)
    is_draining |= any(admission.is_closed for admission in gateway.admissions.values())
    has_failed = any(model.has_failed for model in gateway.router.models)
    loading = "failed" if has_failed else "loading"
    status = "draining" if is_draining else "ready" if is_ready else loading
    return json_response(Health(status, models), 200 if status == "ready" else 503)


def _group(status: GroupStatus, with_failure: bool) -> GroupHealth:
    failure = status.failure if with_failure else msgspec.UNSET
    return GroupHealth(status.name, status.state, status.phase, status.percent, status.restarts, failure)
