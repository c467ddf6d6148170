"""What `consilium status` makes of a router's answer."""

from __future__ import annotations

import io

from rich.console import Console

from consilium.router_status import render, summary
from protos.router.v1 import router_pb2
from router_service.holdings import expert_sets
from tests.router_workers import EVERYTHING, LEFT, worker


def answer() -> router_pb2.GetPlacementResponse:
    return router_pb2.GetPlacementResponse(
        placement=router_pb2.Placement(
            epoch=7,
            workers=[
                router_pb2.PlacedWorker(worker_id="a", address="a:1", experts=expert_sets(EVERYTHING[:-1])),
                router_pb2.PlacedWorker(worker_id="b", address="b:1", experts=expert_sets(LEFT)),
            ],
        ),
        workers=[
            router_pb2.WorkerState(worker=worker("a", device="cpu"), held=7, wanted=7, lease_left_ms=9500),
            router_pb2.WorkerState(worker=worker("b", host="h", device="cpu"), held=3, wanted=4, draining=True),
        ],
        loads=[router_pb2.LayerLoad(layer=1, rows=[1, 0, 30, 2], reads=[1, 0, 1, 1])],
        leader=True,
        missing=1,
        balance=1.25,
        gateways=[router_pb2.GatewayState(gateway_id=name, epoch=epoch) for name, epoch in (("g", 7), ("h", 6))],
    )


def test_the_summary() -> None:
    status = summary(answer())
    assert (status["epoch"], status["missing_experts"], status["balance"]) == (7, 1, 1.25)
    assert (status["experts"], status["copies"], status["fewest_copies"], status["most_copies"]) == (7, 11, 1, 2)
    hottest = [(each["layer"], each["expert"], each["rows_per_second"], each["copies"]) for each in status["hottest"]]
    assert hottest == [(1, 2, 30.0, 1), (1, 3, 2.0, 0), (1, 0, 1.0, 2)]
    assert [each["lease_seconds"] for each in status["workers"]] == [9.5, 0.0]


def test_the_table() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(summary(answer())))
    text = console.export_text()
    assert (
        "epoch 7 · 2 workers · 2 gateways, 1 on an older epoch · 11 copies of 7 experts (1 to 2 each) · "
        "busiest/mean 1.25 · 1 experts have no holder" in text
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "a:1", "cpu", "ready", "7", "of", "7", "8", "9.5", "s"] in rows
    assert ["b", "b:1", "cpu", "h", "leaving", "3", "of", "4", "8", "0.0", "s"] in rows


def test_a_worker_that_is_not_heard_of_is_shown_as_such() -> None:
    found = answer()
    found.lease_ms = 10_000
    found.workers[0].lease_left_ms = 7_900  # it is about to renew its lease
    del found.gateways[0]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(summary(found)))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "a:1", "cpu", "ready"] in [row[:4] for row in rows]
    assert ["b", "b:1", "cpu", "h", "silent", "for", "10", "s"] in [row[:8] for row in rows]
    assert rows[0][:8] == ["epoch", "7", "·", "2", "workers", "·", "1", "gateway,"]


def test_before_anything_is_known() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(summary(router_pb2.GetPlacementResponse(missing=8))))
    assert (
        "0 workers · 0 gateways · 0 copies of 0 experts (0 each) · no load yet · 8 experts have no holder"
        in console.export_text()
    )
