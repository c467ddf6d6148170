"""What operators and probes ask: models, version, load, metrics; and, without a key, health and readiness."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from consilium import __version__
from consilium.errors import NotReady
from gateway.dependencies import GatewayOf
from gateway.state import Gateway

router = APIRouter()
probes = APIRouter()


@probes.get("/health")
async def health() -> Response:
    """Alive: the process answers. It says nothing about the engine or the experts; see /ready."""
    return JSONResponse({"status": "ok"})


@probes.get("/ready")
async def ready(gateway: GatewayOf) -> Response:
    """Whether a completion would be computed now. Raises NotReady with the reason."""
    reason = gateway.engine.why_not_ready()
    if reason is not None:
        raise NotReady(reason)
    return JSONResponse({"status": "ready", "model": gateway.model.name})


@router.get("/v1/models")
async def list_models(gateway: GatewayOf) -> Response:
    """The one model there is."""
    return JSONResponse({"object": "list", "data": [_card(gateway)]})


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, gateway: GatewayOf) -> Response:
    """The same by its name."""
    gateway.model.check_name(name)
    return JSONResponse(_card(gateway))


@router.get("/version")
async def version() -> Response:
    """The version of Consilium."""
    return JSONResponse({"version": __version__})


@router.get("/load")
async def load(gateway: GatewayOf) -> Response:
    """How full the gateway is, in sequences and in tokens of the KV cache, and its workers."""
    engine = gateway.engine
    stats, status = engine.stats, engine.status
    workers = [
        {
            "group": each.group,
            "address": each.address,
            "connected": each.connected,
            "transport": each.transport,
            "detail": each.detail,
        }
        for each in (status.workers if status else ())
    ]
    return JSONResponse(
        {
            "open_sequences": engine.open_sequences,
            "capacity": engine.capacity,
            "running": stats.running if stats else 0,
            "waiting": stats.waiting if stats else 0,
            "kv_tokens_used": stats.kv_tokens_used if stats else 0,
            "kv_tokens_total": status.kv_tokens_total if status else 0,
            "workers": workers,
        }
    )


@router.get("/load/experts")
async def expert_load(gateway: GatewayOf) -> Response:
    """Rows that went to each expert since the gateway started, at most a second old; `rows` is by expert id."""
    layers = sorted(gateway.metrics.experts.rows.items())
    return JSONResponse({"layers": [{"layer": layer, "rows": rows} for layer, rows in layers]})


@router.get("/metrics")
async def metrics(request: Request, gateway: GatewayOf) -> Response:
    """For Prometheus."""
    content, content_type = gateway.metrics.exposition(request.headers.get("accept"))
    return Response(content, headers={"content-type": content_type})


def _card(gateway: Gateway) -> dict[str, Any]:
    model = gateway.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "consilium",
        "max_model_len": gateway.context(),
    }
