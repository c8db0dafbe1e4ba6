"""What the server is and how it does: models, health, version."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gemmakit import __version__
from gemmakit.serve.metrics import Metrics
from gemmakit.serve.served import ServedModel
from gemmakit.serve.service import service_of
from gemmakit.serve.worker import Worker

router = APIRouter(tags=["status"])


@router.get("/health", responses={503: {"description": "loading, draining or failed"}})
async def health(request: Request) -> JSONResponse:
    """200 once requests are answered."""
    state = service_of(request).state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """What was counted and how the engine stands, as Prometheus reads it."""
    service = service_of(request)
    service.ready()
    worker = cast(Worker, service.worker)
    stats = None if worker.engine is None else await asyncio.wrap_future(worker.call(worker.engine.stats))
    told = cast(Metrics, service.metrics).text(stats, service.unknown_fields)
    return Response(told, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    served = service_of(request).ready()
    return {"object": "list", "data": [_card(served, name) for name in (*served.names, *served.adapters)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    return _card(service_of(request).ready(name), name)


def _card(served: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "gemmakit",
        "parent": served.name if name in served.adapters else None,
        "max_model_len": served.context,
        "capabilities": served.capabilities,
    }
