"""Which workers a pool finds behind its names, which it uses, and what it says of the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from consilium.frames import PROTOCOL_VERSION
from gateway import worker_connection, worker_pool
from gateway.placement import describe_missing
from protos.tensor.v1 import tensor_pb2
from tests.integration.fake_workers import (
    ALL,
    MODEL,
    SECONDS,
    Names,
    connected,
    describe,
    following,
    serving,
    status,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


async def test_addresses_behind_one_name_are_replicas_that_come_and_go(names: Names) -> None:
    async with serving(describe(), describe(), describe()) as (first, second, third):
        names.known["experts"] = {first.address, second.address}
        async with following("experts:1") as gateway:
            view = await gateway.until(connected(first, second))
            expected = tuple(sorted((first.address, second.address)))
            assert view.placement.holders == {(layer, expert): expected for layer in range(2) for expert in ALL}
            assert [each.experts for each in view.statuses] == [8, 8]
            kept = view.workers[second.address]
            gateway.send(first)
            await first.receive_call()  # a stream that is cancelled before its worker has seen it is never closed there
            names.known["experts"] = {second.address, third.address}
            view = await gateway.until(connected(second, third))
            gateway.send(third)
            await third.receive_call()
            await asyncio.wait_for(first.closed.get(), SECONDS)
            assert view.workers[second.address] is kept
            view = await gateway.until(lambda view: len(view.statuses) == 2)
            assert {each.address for each in view.statuses} == {second.address, third.address}
            assert second.closed.empty()
        await asyncio.wait_for(third.closed.get(), SECONDS)  # the pool's end closes the others


async def test_a_name_that_does_not_resolve_is_told_and_what_was_known_is_kept(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known["experts"] = OSError("no such name")
        async with following("experts:1") as gateway:
            view = await gateway.until(lambda view: bool(view.statuses))
            assert status(view, "experts:1").detail == "does not resolve: no such name"
            names.known["experts"] = {worker.address}
            view = await gateway.until(connected(worker))
            assert [each.address for each in view.statuses] == [worker.address]
            names.known["experts"] = OSError("the name server is away")
            await names.looked_up("experts")
            gateway.send(worker)
            await worker.receive_call()
            assert worker.closed.empty()


async def test_an_address_that_two_endpoints_name_stays_until_neither_does(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known |= {"one": {worker.address}, "two": {worker.address}}
        async with following("one:1", "two:1") as gateway:
            view = await gateway.until(connected(worker))
            assert [each.address for each in view.statuses] == [worker.address]
            names.known["one"] = set()
            await names.looked_up("one")
            call = gateway.send(worker)
            worker.answer(await worker.receive_call())
            await gateway.outcome(call)
            assert worker.asked.qsize() == 2  # the same two connections from the beginning
            names.known["two"] = set()
            view = await gateway.until(connected())
            await asyncio.wait_for(worker.closed.get(), SECONDS)
            names.known["one"] = {worker.address}
            await gateway.until(connected(worker))


async def test_an_address_that_moves_from_one_name_to_another_is_not_lost(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "RESOLVE_INTERVAL", 0.0)  # one looks while the other still closes
    async with serving(describe()) as (worker,):
        names.known |= {"one": {worker.address}, "two": set()}
        async with following("one:1", "two:1") as gateway:
            await gateway.until(connected(worker))
            for old, new in (("one", "two"), ("two", "one")):
                names.known |= {old: set(), new: {worker.address}}
                await names.looked_up("one")
                await names.looked_up("two")
                await gateway.until_now()
                await gateway.until(connected(worker))


async def test_a_name_that_two_groups_have_may_lose_its_addresses(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known["experts"] = {worker.address}
        async with following("experts:1", "experts:1") as gateway:
            await gateway.until(connected(worker))
            names.known["experts"] = set()
            await gateway.until(connected())
            await names.looked_up("experts")
            names.known["experts"] = {worker.address}
            await gateway.until(connected(worker))


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"protocol_version": 7}, f"its protocol version is 7, this gateway's is {PROTOCOL_VERSION}"),
        ({"model_fingerprint": "a" * 64}, f"its model fingerprint is {'a' * 16}, this gateway's is {'f' * 16}"),
        ({"quantization": "int8"}, "its quantization is int8, this gateway's is none"),
        ({"row_dtype": tensor_pb2.DTYPE_BFLOAT16}, "dtype is"),
        ({"hidden_size": 48}, "its hidden size is 48, this gateway's is 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_worker_of_another_kind_is_refused_and_told_what_differs(fields: dict[str, Any], detail: str) -> None:
    async with (
        serving(describe(**fields), describe()) as (other, worker),
        following(other.address, worker.address) as gateway,
    ):
        view = await gateway.until(lambda view: status(view, other.address).detail.startswith("not used"))
        assert detail in status(view, other.address).detail
        assert not status(view, other.address).connected
        view = await gateway.until(connected(worker))
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        # Once it was restarted as it should be, it is taken.
        other.description.CopyFrom(describe())
        await gateway.until(connected(other, worker))


async def test_of_replicas_with_different_weights_the_odd_one_is_not_used(names: Names) -> None:
    damaged = describe()
    damaged.layers[1].hashes[2] = b"another" * 2 + b"!!"
    async with serving(describe([0]), damaged, describe(numerics_class="other")) as (narrow, odd, worker):
        names.known["experts"] = {narrow.address, odd.address}
        async with following("experts:1") as gateway:
            await gateway.until(connected(narrow, odd))  # nothing that both hold differs
            names.known["experts"].add(worker.address)  # type: ignore[union-attr]  # set just above
            view = await gateway.until(lambda view: status(view, worker.address).detail.startswith("not used"))
            assert status(view, worker.address).detail == (
                "not used: its weights of expert 2 of layer 1 differ from a replica's"
            )
            assert connected(narrow, odd)(view)
            assert view.identities[1, 2].weights == b"another" * 2 + b"!!"
            names.known["experts"] = {narrow.address, worker.address}
            view = await gateway.until(connected(narrow, worker))
            assert status(view, worker.address).detail == ""
            assert view.identities[1, 2] == (bytes([2]) * 16, "other")
            assert (1, 0) not in view.identities  # its two holders compute it differently


async def test_the_experts_nobody_holds_are_named_until_somebody_does() -> None:
    async with serving(describe([0, 3, 99]), describe([1, 2])) as (first, second):
        second.answers.clear()
        async with following(first.address, second.address) as gateway:
            view = await gateway.until(lambda _: True)
            assert describe_missing(view.placement.missing(MODEL)) == "no worker holds experts 0-3 of layers 0-1"
            view = await gateway.until(connected(first))
            assert describe_missing(view.placement.missing(MODEL)) == "no worker holds experts 1-2 of layers 0-1"
            assert status(view, first.address).experts == 4  # those that the model does not have are not counted
            second.answers.set()
            view = await gateway.until(connected(first, second))
            assert view.placement.missing(MODEL) == []


async def test_a_worker_that_hangs_at_describe_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_connection, "DESCRIBE_TIMEOUT", 0.3)
    async with serving(describe(), describe()) as (hung, worker):
        hung.answers.clear()
        async with following(hung.address, worker.address) as gateway:
            await gateway.until(connected(worker))
            view = await gateway.until(lambda view: "Deadline" in status(view, hung.address).detail)
            assert not status(view, hung.address).connected
            assert connected(worker)(view)
            hung.answers.set()
            await gateway.until(connected(hung, worker))
