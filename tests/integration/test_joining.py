"""A worker that is told an address and nothing else: weights from peers, but none that the router does not know."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.errors import NotReady
from consilium.experts import ExpertWeights
from expert_service.sources import LocalWeights, PeerWeights, blank_weights, chunks, read_weights
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.router.v1 import router_pb2, router_pb2_grpc
from tests.integration.grpc_client import SECONDS, connected
from tests.integration.test_registration import held_by, settled, states
from tests.integration.test_router_service import EVERYTHING, Caller, argv, router
from tests.stack import running, worker_argv
from tests.tiny_models import save_mixtral

LAYERS, EXPERTS = 3, 4


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_worker_with_only_an_address_gets_everything_from_a_peer(tiny_mixtral: Path, quantization: str) -> None:
    kind = ("--quantization", quantization)
    with router(tiny_mixtral, "--replicas", "2", *kind) as (process, caller), ExitStack() as cleanup:
        common = ("--join", process.address, "--speed", "1")
        first = cleanup.enter_context(running(worker_argv("all", "--model", str(tiny_mixtral), *common, *kind)))
        joined = cleanup.enter_context(running(worker_argv("all", *common)))
        states(caller, lambda each: [one.held for one in each.workers] == [12, 12])
        assert held_by(joined) == held_by(first) == set(EVERYTHING)
        described = []
        for worker in (first, joined):
            with connected(worker.address) as channel:
                stub = expert_pb2_grpc.ExpertServiceStub(channel)
                described.append(stub.Describe(expert_pb2.DescribeRequest(), timeout=SECONDS))
        ours, theirs = ([list(layer.hashes) for layer in each.layers] for each in described)
        assert ours == theirs
        assert described[0].model_fingerprint == described[1].model_fingerprint
        assert described[1].quantization == quantization


def test_a_shape_is_made_and_not_fetched() -> None:
    with (
        running(argv(Path("shape:tiny"))) as process,
        running(worker_argv("all", "--join", process.address, "--speed", "1")) as joined,
        connected(process.address) as channel,
    ):
        states(Caller(channel, ""), settled(1))
        assert held_by(joined)


class Peer(expert_pb2_grpc.ExpertServiceServicer):
    """Sends ``parts``, whoever asks for whatever."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts, self.asked = parts, 0

    def FetchWeights(self, request: expert_pb2.FetchWeightsRequest, context: Any) -> Iterator[Any]:
        self.asked += 1
        return (expert_pb2.FetchWeightsResponse(data=each) for each in self.parts)


class Placed(router_pb2_grpc.RouterServiceServicer):
    """One placement."""

    def __init__(self, addresses: list[str], digest: bytes) -> None:
        held = [router_pb2.ExpertSet(layer=0, experts=[1])]
        workers = [router_pb2.PlacedWorker(address=each, experts=held) for each in addresses]
        hashes = [router_pb2.LayerHashes(layer=0, hashes=bytes(16) + digest)]
        self.placement = router_pb2.Placement(epoch=1, workers=workers, hashes=hashes)

    def GetPlacement(self, request: router_pb2.GetPlacementRequest, context: Any) -> router_pb2.GetPlacementResponse:
        return router_pb2.GetPlacementResponse(placement=self.placement)


@contextmanager
def served(*peers: Peer, digest: bytes) -> Iterator[str]:
    """The address of a router that knows these peers."""
    with ExitStack() as cleanup, ThreadPoolExecutor(4) as threads:

        def serve(register: Any, servicer: object) -> str:
            server = grpc.server(threads)
            register(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            cleanup.callback(lambda: server.stop(None).wait())
            return f"127.0.0.1:{port}"

        addresses = [serve(expert_pb2_grpc.add_ExpertServiceServicer_to_server, each) for each in peers]
        yield serve(router_pb2_grpc.add_RouterServiceServicer_to_server, Placed(addresses, digest))  # type: ignore[abstract]  # nothing else is called
        cleanup.close()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertWeights, ExpertWeights]:
    """An expert, and the layout of all of them."""
    checkpoint = Checkpoint(save_mixtral(tmp_path_factory.mktemp("model")))
    model = checkpoint.config
    arithmetic = find_arithmetic("int8", "bfloat16", model.hidden_size, model.expert_size)
    return LocalWeights(checkpoint, arithmetic).load(0, 1)[0], blank_weights(arithmetic, model)


def test_weights_survive_the_way_whatever_their_parts(known: tuple[ExpertWeights, ExpertWeights]) -> None:
    weights, layout = known
    whole = b"".join(chunks(weights))
    for size in (1, 7, 1000, len(whole)):
        found = read_weights(layout, [whole[at : at + size] for at in range(0, len(whole), size)])
        assert found is not None
        assert found.content_hash() == weights.content_hash()
        assert all(torch.equal(*pair) for pair in zip(found.tensors(), weights.tensors(), strict=True))
    assert read_weights(layout, [whole[:-1]]) is None
    assert read_weights(layout, [whole, b"x"]) is None


def test_what_cannot_be_verified_is_thrown_away(known: tuple[ExpertWeights, ExpertWeights]) -> None:
    weights, layout = known
    right = list(chunks(weights))
    wrong = [right[0][:5] + bytes([right[0][5] ^ 1]) + right[0][6:], *right[1:]]
    # Nothing else is called.
    liars, honest = [Peer(wrong), Peer(right[:-1]), Peer([])], Peer(right)  # type: ignore[abstract]
    digest = weights.content_hash()
    with served(*liars, honest, digest=digest) as address:
        source = PeerWeights(f"grpc://{address}", (), layout)
        while not all(each.asked for each in liars):  # in an order of chance
            found, said = source.load(0, 1)
            assert found.content_hash() == said == digest
    with served(*liars, digest=digest) as address, pytest.raises(NotReady, match="expert 1 of layer 0"):
        PeerWeights(f"grpc://{address}", (), layout).load(0, 1)
    with served(honest, digest=bytes(16)) as address, pytest.raises(NotReady):
        PeerWeights(f"grpc://{address}", (), layout).load(0, 1)
