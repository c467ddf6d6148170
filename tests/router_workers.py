"""Workers as a router sees them, without processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from consilium.frames import PROTOCOL_VERSION
from protos.expert.v1 import expert_pb2
from protos.router.v1 import router_pb2
from protos.tensor.v1 import tensor_pb2
from router_service.deployment import Deployment

LAYERS, EXPERTS = (0, 1), 4
DEPLOYMENT = Deployment("f" * 64, "int8", tensor_pb2.DTYPE_BFLOAT16, 64, LAYERS, EXPERTS)
EVERYTHING = [(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
LEFT, RIGHT = [each for each in EVERYTHING if each[1] < 2], [each for each in EVERYTHING if each[1] >= 2]


def layer_experts(pairs: Iterable[tuple[int, int]], content: str = "") -> list[expert_pb2.LayerExperts]:
    """What holds these experts, with hashes that are equal for equal ``content``."""
    layers: dict[int, list[int]] = {}
    for layer, expert in sorted(pairs):
        layers.setdefault(layer, []).append(expert)
    return [
        expert_pb2.LayerExperts(
            layer=layer,
            experts=experts,
            hashes=[f"{content}{layer}/{expert}".ljust(16)[:16].encode() for expert in experts],
        )
        for layer, experts in layers.items()
    ]


def worker(name: str, capacity: int = 8, host: str = "", **said: Any) -> router_pb2.Worker:
    """One that fits DEPLOYMENT, but for what is ``said`` of it."""
    description: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "worker_id": name,
        "group": "experts",
        "model_fingerprint": DEPLOYMENT.model_fingerprint,
        "quantization": "int8",
        "row_dtype": tensor_pb2.DTYPE_BFLOAT16,
        "numerics_class": "int8-v1",
        "hidden_size": 64,
        **said,
    }
    return router_pb2.Worker(
        description=expert_pb2.DescribeResponse(**description),
        address=f"{name}:1",
        host=host,
        capacity=capacity,
        row_ns=10_000,
        read_ns=80_000,
    )


def record(name: str, held: Iterable[tuple[int, int]] = (), **more: Any) -> router_pb2.WorkerRecord:
    """A worker with what it holds."""
    return router_pb2.WorkerRecord(worker=worker(name, **more), held=layer_experts(held))
