"""Where a worker's weights come from: a checkpoint on this machine, or workers that hold them.

Letters: D hidden size, F expert FFN size.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import grpc
import torch

from consilium.checkpoint import Checkpoint, ExpertBiases, ExpertTensors
from consilium.content_hash import HASH_BYTES
from consilium.errors import NotReady
from consilium.experts import Arithmetic, ExpertWeights
from consilium.formats.scheme import INT4_GROUP
from consilium.int4 import Int4
from consilium.int4_experts import Int4Arithmetic
from consilium.model_config import ModelConfig
from consilium.rpc import channel_options, from_rpc_error, router_channel_options
from consilium.tokens import Metadata
from expert_service.expert_memory import Held
from expert_service.paged_expert import OpenFiles, PagedExpert
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

CHUNK = 2**20  # bytes of one message
FETCH_SECONDS = 120.0  # for one expert
ASK_SECONDS = 5.0
FRESH_SECONDS = 1.0  # so long what the router said of who holds what is asked of peers


class WeightSource(Protocol):
    """Used on one thread at a time."""

    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        """An expert with its content hash.

        Raises CheckpointError where the files are wrong, NotReady where it may be had later.
        """
        ...


class HeldSource(Protocol):
    """As WeightSource, also for experts that stay on disk."""

    def load(self, layer: int, expert: int) -> tuple[Held, bytes]: ...


class PlacedWeights:
    """Those of another source, after they were brought to where they are computed with."""

    def __init__(self, source: WeightSource, place: Callable[[ExpertWeights], ExpertWeights]) -> None:
        self._source, self._place = source, place

    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        weights, digest = self._source.load(layer, expert)
        return self._place(weights), digest


class LocalWeights:
    """From a folder, or from a shape."""

    def __init__(self, checkpoint: Checkpoint, arithmetic: Arithmetic) -> None:
        self._checkpoint, self._arithmetic = checkpoint, arithmetic

    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        weights = self._arithmetic.prepare(self._checkpoint.expert(layer, expert))
        stored = self._checkpoint.stored_hash(layer, expert, int4=isinstance(weights.gate, Int4))
        return weights, stored or weights.content_hash()


class DiskWeights:
    """From a folder that has experts as they are computed with; the large part of each is not read."""

    def __init__(self, checkpoint: Checkpoint, arithmetic: Arithmetic, layout: ExpertWeights) -> None:
        """``layout`` has the shapes and types of an expert's tensors."""
        self._checkpoint, self._arithmetic, self._layout = checkpoint, arithmetic, layout
        self._files, self._last_layer = OpenFiles(), -1

    def load(self, layer: int, expert: int) -> tuple[PagedExpert, bytes]:
        """As every source. Raises ConfigError where the checkpoint has not what is computed with."""
        if layer != self._last_layer:
            self._checkpoint.release()
            self._last_layer = layer
        weights = self._arithmetic.prepare(self._checkpoint.expert(layer, expert))
        found = PagedExpert(weights, self._layout, self._checkpoint.locate, self._files)
        return found, self._checkpoint.stored_hash(layer, expert) or found.content_hash()


class PeerWeights:
    """From any worker that holds it; what has not the hash that the router knows is thrown away."""

    def __init__(self, router: str, metadata: Metadata, layout: ExpertWeights, weight_version: str = "") -> None:
        """``layout`` has the shapes and types of an expert's tensors."""
        self._metadata, self._layout, self._version = metadata, layout, weight_version
        channel = grpc.insecure_channel(router.removeprefix("grpc://"), options=router_channel_options())
        self._router = router_pb2_grpc.RouterServiceStub(channel)
        self._channels: dict[str, grpc.Channel] = {}
        self._placement, self._asked = router_pb2.Placement(), -FRESH_SECONDS

    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        placement = self._placed()
        digest = _digest(placement, layer, expert)
        holders = list(_holders(placement, layer, expert))
        random.shuffle(holders)
        for address in holders if any(digest) else ():
            try:
                weights = read_weights(self._layout, self._fetch(address, layer, expert))
            except grpc.RpcError as error:
                logger.warning("weights from %s: %s", address, from_rpc_error(error).message)
                continue
            if weights is not None and weights.content_hash() == digest:
                return weights, digest
            logger.error("what %s sent of expert %d of layer %d is not what the router knows", address, expert, layer)
        raise NotReady(f"no worker that can be reached has expert {expert} of layer {layer}")

    def _placed(self) -> router_pb2.Placement:
        if time.monotonic() - self._asked > FRESH_SECONDS:
            try:
                request = router_pb2.GetPlacementRequest(weight_version=self._version)
                answer = self._router.GetPlacement(request, timeout=ASK_SECONDS, metadata=self._metadata)
            except grpc.RpcError as error:
                raise NotReady(f"the router cannot say who holds weights: {from_rpc_error(error).message}") from None
            self._placement, self._asked = answer.placement, time.monotonic()
        return self._placement

    def _fetch(self, address: str, layer: int, expert: int) -> Iterator[bytes]:
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address, options=channel_options())
        stub = expert_pb2_grpc.ExpertServiceStub(self._channels[address])
        request = expert_pb2.FetchWeightsRequest(layer=layer, expert=expert)
        stream = stub.FetchWeights(request, timeout=FETCH_SECONDS, metadata=self._metadata)
        return (message.data for message in stream)


def blank_weights(arithmetic: Arithmetic, model: ModelConfig, int4_group: int = INT4_GROUP) -> ExpertWeights:
    """An expert of ones: as large as the model's, for whoever has none yet."""
    inner, outer = torch.ones(model.expert_size, model.hidden_size), torch.ones(model.hidden_size, model.expert_size)
    biases = None
    if model.expert_bias:
        biases = ExpertBiases(
            torch.ones(model.expert_size), torch.ones(model.expert_size), torch.ones(model.hidden_size)
        )
    found = ExpertTensors(inner, inner.clone(), outer, biases, model.activation)
    if isinstance(arithmetic, Int4Arithmetic):
        return arithmetic.round(found, int4_group)
    return arithmetic.prepare(found)


def chunks(weights: ExpertWeights) -> Iterator[bytes]:
    """The bytes of every tensor as they travel."""
    for tensor in weights.tensors():
        flat = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for start in range(0, len(flat), CHUNK):
            yield flat[start : start + CHUNK].tobytes()


def read_weights(layout: ExpertWeights, parts: Iterable[bytes]) -> ExpertWeights | None:
    """An expert like ``layout`` with the bytes that come; None where they are too few or too many."""
    made = layout.map(torch.empty_like)
    rooms = [tensor.view(-1).view(torch.uint8).numpy() for tensor in made.tensors()]
    place = start = 0
    for data in parts:
        rest = memoryview(data)
        while rest:
            if place == len(rooms):
                return None
            taken = min(len(rest), len(rooms[place]) - start)
            rooms[place][start : start + taken] = rest[:taken]
            rest, start = rest[taken:], start + taken
            if start == len(rooms[place]):
                place, start = place + 1, 0
    return made if place == len(rooms) else None


def _holders(placement: router_pb2.Placement, layer: int, expert: int) -> Iterator[str]:
    for worker in placement.workers:
        if any(each.layer == layer and expert in each.experts for each in worker.experts):
            yield worker.address


def _digest(placement: router_pb2.Placement, layer: int, expert: int) -> bytes:
    """Zeros, or nothing, where the router knows of none."""
    known = next((each.hashes for each in placement.hashes if each.layer == layer), b"")
    return known[expert * HASH_BYTES : (expert + 1) * HASH_BYTES]
