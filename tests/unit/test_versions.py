"""How a router keeps versions of the weights apart, and how many."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from consilium.config import RouterConfig
from consilium.errors import ConfigError, InvalidRequest
from protos.router.v1 import router_pb2
from router_service.controller import Controller
from router_service.servicer import Context, RouterServicer
from router_service.store import MemoryStore
from router_service.versions import MOST, Version, Versions
from tests.router_workers import DEPLOYMENT, EVERYTHING, layer_experts, worker

CONTEXT = cast("Context", None)  # nothing looks at it


def start(_: str) -> Version:
    """One that never ticks by itself."""
    config, store = RouterConfig(), MemoryStore()
    controller = Controller(DEPLOYMENT, config, store)
    idle = asyncio.ensure_future(asyncio.Event().wait())
    return Version(store, controller, RouterServicer(DEPLOYMENT, config, store, controller, {}), cast("Any", idle))


def register(version: str, content: str = "") -> router_pb2.RegisterRequest:
    held = layer_experts(EVERYTHING, content)
    return router_pb2.RegisterRequest(worker=worker(f"w{version}", weight_version=version), held=held)


def run(body: Any) -> None:
    async def main() -> None:
        versions = Versions(start)
        try:
            await body(versions)
        finally:
            await versions.close()

    asyncio.run(main())


def test_other_weights_are_welcome_under_another_name_only() -> None:
    async def body(versions: Versions) -> None:
        await versions.Register(register(""), CONTEXT)
        with pytest.raises(ConfigError, match="have the hash"):
            await versions.Register(
                router_pb2.RegisterRequest(worker=worker("x"), held=layer_experts(EVERYTHING, "y")), CONTEXT
            )
        await versions.Register(register("v2", "y"), CONTEXT)
        for name in ("", "v2"):
            answer = await versions.GetPlacement(router_pb2.GetPlacementRequest(weight_version=name), CONTEXT)
            assert [each.worker.description.worker_id for each in answer.workers] == [f"w{name}"]
            assert list(answer.weight_versions) == ["", "v2"]

    run(body)


def test_there_is_room_for_a_few_and_for_more_once_one_is_gone() -> None:
    async def body(versions: Versions) -> None:
        for number in range(1, MOST):
            await versions.Register(register(f"v{number}"), CONTEXT)
            await versions.controllers()[f"v{number}"].tick()
        with pytest.raises(ConfigError, match=f"{MOST} versions of the weights are served already"):
            await versions.Register(register("more"), CONTEXT)
        left = router_pb2.DrainRequest(worker_id="wv2", weight_version="v2")
        assert (await versions.Drain(left, CONTEXT)).done
        await versions.controllers()["v2"].tick()
        await versions.Register(register("more"), CONTEXT)
        assert set(versions.controllers()) == {"", "v1", "v3", "more"}
        for name in ("a/b", "x" * 65):
            with pytest.raises(InvalidRequest):
                await versions.Register(register(name), CONTEXT)

    run(body)
