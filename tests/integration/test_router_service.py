"""A router as workers and gateways meet it: over gRPC, with tokens, alone and with others over one Redis."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from consilium.model_folder import read_model_folder
from consilium.tokens import token_metadata
from protos.router.v1 import router_pb2, router_pb2_grpc
from router_service.holdings import pairs_of
from tests.integration.grpc_client import SECONDS, connected
from tests.router_workers import layer_experts, record
from tests.stack import Process, launch, running
from tests.valkey import Valkey, valkey

# tiny_mixtral: 4 experts in each of 3 layers
EVERYTHING = [(layer, expert) for layer in range(3) for expert in range(4)]
LEFT, RIGHT = [each for each in EVERYTHING if each[1] < 2], [each for each in EVERYTHING if each[1] >= 2]
# README's user of Redis for routers: nothing but this, on keys of theirs alone.
COMMANDS = ["get", "set", "mget", "del", "scan", "pexpire", "pttl", "hget", "hset", "incr", "evalsha", "script|load"]
USER = ("--user", "router", "on", ">secret", "~consilium:router:*", "-@all", *(f"+{each}" for each in COMMANDS))


class Caller:
    """One router, called with one token."""

    def __init__(self, channel: grpc.Channel, fingerprint: str, token: str | None = None) -> None:
        self.stub = router_pb2_grpc.RouterServiceStub(channel)
        self.fingerprint, self.metadata = fingerprint, token_metadata(token)

    def register(self, name: str, held: Sequence[tuple[int, int]] = (), **said: Any) -> router_pb2.Orders:
        known = record(name, held, capacity=12, model_fingerprint=self.fingerprint, **said)
        request = router_pb2.RegisterRequest(worker=known.worker, held=known.held)
        return self.stub.Register(request, timeout=SECONDS, metadata=self.metadata).orders

    def heartbeat(self, name: str, held: Sequence[tuple[int, int]] | None = None) -> router_pb2.Orders:
        said = None if held is None else router_pb2.Held(layers=layer_experts(held))
        request = router_pb2.HeartbeatRequest(worker_id=name, held=said)
        return self.stub.Heartbeat(request, timeout=SECONDS, metadata=self.metadata).orders

    def drain(self, name: str) -> router_pb2.DrainResponse:
        return self.stub.Drain(router_pb2.DrainRequest(worker_id=name), timeout=SECONDS, metadata=self.metadata)

    def report(self, rows: Sequence[int], layers: int = 3) -> None:
        """So many rows of every expert, the same in every layer."""
        counts = [router_pb2.LayerCounts(layer=each, rows=rows, reads=[1] * len(rows)) for each in range(layers)]
        request = router_pb2.ReportLoadRequest(gateway_id="g", interval_ms=100, layers=counts)
        self.stub.ReportLoad(request, timeout=SECONDS, metadata=self.metadata)

    def watch(self) -> Iterator[dict[tuple[int, int], set[str]]]:
        """Who may be asked for each expert, epoch by epoch."""
        stream = self.stub.WatchPlacement(router_pb2.WatchPlacementRequest(), timeout=SECONDS, metadata=self.metadata)
        return (holders(each.placement) for each in stream)

    def state(self) -> router_pb2.GetPlacementResponse:
        return self.stub.GetPlacement(router_pb2.GetPlacementRequest(), timeout=SECONDS, metadata=self.metadata)


def holders(placement: router_pb2.Placement) -> dict[tuple[int, int], set[str]]:
    found: dict[tuple[int, int], set[str]] = {}
    for each in placement.workers:
        for expert in pairs_of(each.experts):
            found.setdefault(expert, set()).add(each.worker_id)
    return found


def alone(**held: Sequence[tuple[int, int]]) -> dict[tuple[int, int], set[str]]:
    """Every expert has one holder."""
    return {expert: {name} for name, experts in held.items() for expert in experts}


def argv(model: Path, *arguments: str) -> list[str]:
    return ["router_service", "--model", str(model), "--port", "0", *arguments]


@contextmanager
def router(model: Path, *arguments: str) -> Iterator[tuple[Process, Caller]]:
    with running(argv(model, *arguments)) as process, calling(process, model) as caller:
        yield process, caller


@contextmanager
def calling(process: Process, model: Path, token: str | None = None) -> Iterator[Caller]:
    with connected(process.address) as channel:
        yield Caller(channel, read_model_folder(model).fingerprint, token)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Configuration for processes; tests/stack.py hands none of this process's on."""
    monkeypatch.setattr("tests.stack._environment", lambda: dict(os.environ))
    return monkeypatch


def test_workers_come_move_and_leave(tiny_mixtral: Path) -> None:
    with router(tiny_mixtral) as (process, caller):
        caller.register("a", LEFT)
        orders = caller.register("b", RIGHT)
        assert (orders.lease_ms, orders.interval_ms) == (10_000, 2_000)
        watch = caller.watch()
        assert next(watch) == alone(a=LEFT, b=RIGHT)
        assert not caller.drain("a").done
        for view in watch:  # a leaves, so b must load; nothing changes until it has
            assert view.keys() == set(EVERYTHING)
            if all(pairs_of(caller.heartbeat("b").wanted) >= set(each) for each in (LEFT, RIGHT)):
                break
        caller.heartbeat("b", EVERYTHING)
        assert next(each for each in watch if each[0, 0] == {"b"}) == alone(b=EVERYTHING)
        while not (answer := caller.drain("a")).done:  # gateways that have not said so yet may still ask it
            assert not answer.last_copies
            caller.heartbeat("a")
        shown = caller.state()
        assert [(each.worker.description.worker_id, each.held) for each in shown.workers] == [("b", 12)]
        assert (shown.leader, shown.missing) == (True, 0)
        with pytest.raises(grpc.RpcError) as caught:
            caller.heartbeat("a")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            caller.register("c", quantization="none")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "quantization is none" in (caught.value.details() or "")
        process.stop()
        assert process.wait() == 0


def test_a_worker_that_started_again_replaces_itself(tiny_mixtral: Path) -> None:
    with router(tiny_mixtral) as (_, caller):
        caller.register("a", EVERYTHING)
        again = record("a2", EVERYTHING, capacity=12, model_fingerprint=caller.fingerprint)
        again.worker.address = "a:1"
        caller.stub.Register(router_pb2.RegisterRequest(worker=again.worker, held=again.held), timeout=SECONDS)
        assert [each.worker.description.worker_id for each in caller.state().workers] == ["a2"]


def test_a_token_says_who_may_do_what(tiny_mixtral: Path, tmp_path: Path) -> None:
    words = {role: f"the-word-of-a-{role}-0123456789" for role in ("worker", "gateway")}
    for role, word in words.items():
        (tmp_path / role).write_text(word)
    files = [part for role in words for part in (f"--{role}-token-file", str(tmp_path / role))]
    with running(argv(tiny_mixtral, "--host", "0.0.0.0", *files)) as process:
        process.address = process.address.replace("0.0.0.0", "127.0.0.1")
        with calling(process, tiny_mixtral, words["worker"]) as worker:
            worker.register("a", EVERYTHING)
            with pytest.raises(grpc.RpcError) as caught:
                next(worker.watch())
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with calling(process, tiny_mixtral, words["gateway"]) as gateway:
            assert next(gateway.watch()).keys() == set(EVERYTHING)
            with pytest.raises(grpc.RpcError) as caught:
                gateway.register("b", EVERYTHING)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "token is that of a gateway; this call is for a worker" in (caught.value.details() or "")
        for wrong in (None, "the-word-of-somebody-else"):
            with calling(process, tiny_mixtral, wrong) as stranger:
                with pytest.raises(grpc.RpcError) as caught:
                    stranger.state()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_without_tokens_a_router_stays_on_loopback(tiny_mixtral: Path) -> None:
    process = launch(argv(tiny_mixtral, "--host", "0.0.0.0"))
    assert process.wait() == 1
    assert "tokens.worker_file: a router that listens on 0.0.0.0 needs a secret" in process.log()


@contextmanager
def two_routers(model: Path, server: Valkey, environment: pytest.MonkeyPatch) -> Iterator[list[tuple[Process, Caller]]]:
    environment.setenv("CONSILIUM_ROUTER__REDIS", f"unix://router:secret@{server.socket}")
    with router(model) as first, router(model) as second:
        yield [first, second]


def leader_of(pairs: Sequence[tuple[Process, Caller]]) -> int:
    """Which of them leads, once one does."""
    while True:
        for place, (_, caller) in enumerate(pairs):
            if caller.state().leader:
                return place


def test_when_the_leader_dies_another_router_leads(tiny_mixtral: Path, environment: pytest.MonkeyPatch) -> None:
    redis = valkey("--maxmemory-policy", "noeviction", *USER)
    with redis as server, two_routers(tiny_mixtral, server, environment) as pairs:
        leading = leader_of(pairs)
        (leader, _), (_, follower) = pairs[leading], pairs[1 - leading]
        follower.register("a", LEFT)
        follower.register("b", RIGHT)
        watch = follower.watch()
        first = next(watch)
        assert first == alone(a=LEFT, b=RIGHT)
        before = follower.state().placement.epoch
        leader.stop(signal.SIGKILL)
        while not follower.state().leader:
            follower.heartbeat("a")
            follower.heartbeat("b")
        assert follower.state().placement.epoch == before  # nothing has changed, so nobody is told anything
        follower.heartbeat("a", EVERYTHING)
        follower.drain("b")
        assert next(each for each in watch if each[0, 3] == {"a"}) == alone(a=EVERYTHING)


def test_a_redis_that_comes_back_empty_takes_nobodys_placement_away(
    tiny_mixtral: Path, environment: pytest.MonkeyPatch
) -> None:
    with valkey() as server:
        environment.setenv("CONSILIUM_ROUTER__REDIS", server.url)
        with router(tiny_mixtral) as (process, caller):
            caller.register("a", LEFT)
            caller.register("b", RIGHT)
            watch = caller.watch()
            before = next(watch)
            server.kill()
            with pytest.raises(grpc.RpcError) as caught:
                caller.heartbeat("a")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            server.start()
            while "leases were lost" not in process.log():
                caller.state()
            with pytest.raises(grpc.RpcError) as caught:
                caller.heartbeat("a")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            caller.register("a", LEFT)
            assert holders(caller.state().placement) == before  # b is not known, and not dead either
            caller.register("b", RIGHT)
            assert holders(caller.state().placement) == before
