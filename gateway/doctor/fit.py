"""Whether workers can serve one model together, from what they say of themselves. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from consilium.frames import PROTOCOL_VERSION
from consilium.wire import TORCH_DTYPES
from protos.expert.v1 import expert_pb2

Description = expert_pb2.DescribeResponse
Place = tuple[int, int]  # layer and expert


def find_misfits(workers: Mapping[str, Description], fingerprint: str | None) -> dict[str, str]:
    """Why workers (by address) do not fit the model of this fingerprint, or the first one; absent if they do."""
    if not workers:
        return {}
    first = next(iter(workers.values()))
    known: dict[Place, bytes] = {}
    misfits = {}
    for address, each in workers.items():
        reason = _difference(each, first, fingerprint) or _other_weights(each, known)
        if reason:
            misfits[address] = reason
        else:
            known.update(held_experts(each))
    return misfits


def held_experts(worker: Description) -> dict[Place, bytes]:
    """What it holds, with the hash of each."""
    return {
        (layer.layer, expert): digest
        for layer in worker.layers
        for expert, digest in zip(layer.experts, layer.hashes, strict=False)
    }


def _difference(worker: Description, first: Description, fingerprint: str | None) -> str | None:
    model = fingerprint or first.model_fingerprint
    for what, theirs, expected in (
        ("protocol version", worker.protocol_version, PROTOCOL_VERSION),
        ("model fingerprint", worker.model_fingerprint[:16], model[:16]),
        ("quantization", worker.quantization, first.quantization),
        ("dtype", TORCH_DTYPES.get(worker.row_dtype), TORCH_DTYPES.get(first.row_dtype)),
        ("hidden size", worker.hidden_size, first.hidden_size),
    ):
        if theirs != expected:
            return f"its {what} is {theirs} where {expected} is expected; start all workers alike"
    return None


def _other_weights(worker: Description, known: Mapping[Place, bytes]) -> str | None:
    for (layer, expert), digest in held_experts(worker).items():
        if known.get((layer, expert), digest) != digest:
            return (
                f"its weights of expert {expert} of layer {layer} differ from a replica's; start it on the same files"
            )
    return None
