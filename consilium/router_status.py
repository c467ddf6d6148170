"""What a router knows, for an operator: as a table that follows it, or once as JSON."""

from __future__ import annotations

import heapq
import json
import time
from typing import Any

import grpc
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from consilium.errors import NotReady
from consilium.rpc import from_rpc_error, router_channel_options
from consilium.tokens import Metadata
from protos.router.v1 import router_pb2, router_pb2_grpc

REFRESH_SECONDS = 1.0
RPC_SECONDS = 5.0
HOTTEST = 8
LATE = 0.7  # of a lease that is left: a worker renews it when 0.8 are left


def show(endpoint: str, metadata: Metadata, weight_version: str, *, as_json: bool, once: bool) -> None:
    """Print or follow the status of the router at ``endpoint``; ``metadata`` says who asks. Raises NotReady."""
    console = Console()
    with grpc.insecure_channel(endpoint.removeprefix("grpc://"), options=router_channel_options()) as channel:
        ask = _Asker(channel, metadata, weight_version)
        if as_json:
            print(json.dumps(summary(ask()), indent=2))
        elif once or not console.is_terminal:
            console.print(render(summary(ask())))
        else:
            _follow(console, ask)


def summary(found: router_pb2.GetPlacementResponse) -> dict[str, Any]:
    """What an operator wants to know of it."""
    copies: dict[tuple[int, int], int] = {}
    for worker in found.placement.workers:
        for each in worker.experts:
            for expert in each.experts:
                copies[each.layer, expert] = copies.get((each.layer, expert), 0) + 1
    loads = [(rows, each.layer, expert) for each in found.loads for expert, rows in enumerate(each.rows) if rows > 0]
    counts = sorted(copies.values())
    return {
        "epoch": found.placement.epoch,
        "leader": found.leader,
        "weight_versions": list(found.weight_versions),
        "missing_experts": found.missing,
        "experts": len(copies),
        "copies": sum(counts),
        "fewest_copies": counts[0] if counts else 0,
        "most_copies": counts[-1] if counts else 0,
        "balance": round(found.balance, 3) if found.balance else None,
        "workers": [_worker(each, found.lease_ms) for each in found.workers],
        "gateways": [
            {"id": each.gateway_id, "epoch": each.epoch, "follows": each.epoch == found.placement.epoch}
            for each in found.gateways
        ],
        "hottest": [
            {
                "layer": layer,
                "expert": expert,
                "rows_per_second": round(rows, 2),
                "copies": copies.get((layer, expert), 0),
            }
            for rows, layer, expert in heapq.nlargest(HOTTEST, loads)
        ],
    }


def render(status: dict[str, Any]) -> Group:
    """The same for a terminal."""
    balance = "no load yet" if status["balance"] is None else f"busiest/mean {status['balance']:.2f}"
    behind = sum(not each["follows"] for each in status["gateways"])
    gateways = _count(len(status["gateways"]), "gateway") + (f", {behind} on an older epoch" if behind else "")
    fewest, most = status["fewest_copies"], status["most_copies"]
    each_has = f"{most} each" if fewest == most else f"{fewest} to {most} each"
    head = Text(
        f"epoch {status['epoch']} · {_count(len(status['workers']), 'worker')} · {gateways} · "
        f"{status['copies']} copies of {status['experts']} experts ({each_has}) · {balance}"
    )
    if len(status["weight_versions"]) > 1:
        names = ", ".join(repr(each) for each in status["weight_versions"])
        head.append(f" · versions of the weights: {names} (--weight-version)")
    if status["missing_experts"]:
        head.append(f" · {status['missing_experts']} experts have no holder", style="bold red")
    workers = Table(box=box.SIMPLE_HEAD)
    for heading in ("worker", "address", "runs on", "state"):
        workers.add_column(heading)
    for heading in ("holds", "room for", "lease"):
        workers.add_column(heading, justify="right")
    for each in status["workers"]:
        state = _state(each)
        held = f"{each['held']} of {each['wanted']}"
        where = f"{each['device']} {each['host']}".strip()
        row = (each["id"][:8], each["address"], where, state, held, str(each["capacity"]))
        workers.add_row(*row, f"{each['lease_seconds']:.1f} s")
    hottest = Table(box=box.SIMPLE_HEAD, title="hottest experts", title_justify="left")
    for heading in ("layer", "expert", "rows/s", "copies"):
        hottest.add_column(heading, justify="right")
    for each in status["hottest"]:
        hottest.add_row(str(each["layer"]), str(each["expert"]), f"{each['rows_per_second']:.1f}", str(each["copies"]))
    return Group(head, workers, *([hottest] if status["hottest"] else []))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _state(worker: dict[str, Any]) -> str:
    if worker["late"]:
        return f"silent for {worker['silent_seconds']:.0f} s"
    if worker["draining"]:
        return "leaving"
    if worker["failed"]:
        return f"{worker['failed']} could not be loaded"
    if worker["held"] == worker["wanted"]:
        return "ready"
    return "loading" if worker["held"] < worker["wanted"] else "dropping"


def _worker(each: router_pb2.WorkerState, lease_ms: int) -> dict[str, Any]:
    said = each.worker.description
    return {
        "id": said.worker_id,
        "address": each.worker.address,
        "group": said.group,
        "device": said.device,
        "host": each.worker.host,
        "held": each.held,
        "wanted": each.wanted,
        "capacity": each.worker.capacity,
        "draining": each.draining,
        "failed": each.failed,
        "lease_seconds": each.lease_left_ms / 1e3,
        "silent_seconds": max(0, lease_ms - each.lease_left_ms) / 1e3,
        "late": each.lease_left_ms < LATE * lease_ms,
        "row_us": each.worker.row_ns / 1e3,
        "read_us": each.worker.read_ns / 1e3,
    }


class _Asker:
    def __init__(self, channel: grpc.Channel, metadata: Metadata, weight_version: str) -> None:
        self._version = weight_version
        self._stub, self._metadata = router_pb2_grpc.RouterServiceStub(channel), metadata

    def __call__(self) -> router_pb2.GetPlacementResponse:
        try:
            request = router_pb2.GetPlacementRequest(weight_version=self._version)
            return self._stub.GetPlacement(request, timeout=RPC_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise NotReady(f"the router cannot be asked: {from_rpc_error(error).message}") from None


def _follow(console: Console, ask: _Asker) -> None:
    """Until Ctrl-C; a router that is away for a while is said to be, and asked again."""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown: Group | Text = render(summary(ask()))
            except NotReady as error:
                shown = Text(error.message, style="bold red")
            live.update(shown, refresh=True)
            time.sleep(REFRESH_SECONDS)
