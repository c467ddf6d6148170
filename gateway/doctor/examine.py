"""Asks every worker, and puts what is found together: who is there, who fits, how fast each is, what that means."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from consilium import mps
from consilium.config import has_integer_rows, split_endpoint
from consilium.errors import ConsiliumError
from consilium.model_folder import ModelFolder
from consilium.tokens import Metadata
from consilium.wire import TORCH_DTYPES
from gateway.doctor.devices import explain_devices
from gateway.doctor.fit import Description, find_misfits, held_experts
from gateway.doctor.probe import Probe, describe, probe
from gateway.doctor.verdict import Split, Timing, explain

SCALE_BYTES = 4


@dataclass(slots=True)
class Findings:
    """What is known at the end; ``problems`` is why it cannot be served from these workers."""

    probes: dict[str, Probe] = field(default_factory=dict)  # by address
    experts: dict[str, int] = field(default_factory=dict)  # (layer, expert) pairs that each holds
    problems: dict[str, str] = field(default_factory=dict)  # by address or endpoint
    verdict: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Times in seconds."""
        workers = {
            address: {"experts": self.experts[address], "local_link": each.local_link, **asdict(each.timing)}
            for address, each in self.probes.items()
        }
        return {"workers": workers, "problems": self.problems, "verdict": self.verdict}


def examine(
    endpoints: Sequence[str],
    model: ModelFolder | None,
    top_k: int | None,
    calls: int,
    local_links: bool = True,
    say: Callable[[str], None] = lambda _: None,
    metadata: Metadata = (),
) -> Findings:
    """Everything about the workers at ``endpoints``; ``say`` is told what is being done. Raises no ConsiliumError.

    ``metadata`` says who asks.
    """
    findings, workers = Findings(), dict[str, Description]()
    for endpoint in endpoints:
        try:
            for address in _resolve(endpoint):
                say(f"asking {address}")
                workers[address] = describe(address, metadata)
        except (ConsiliumError, OSError) as error:
            findings.problems[endpoint] = f"cannot be reached: {error}"
    findings.problems |= find_misfits(workers, model.fingerprint if model else None)
    fitting = {address: each for address, each in workers.items() if address not in findings.problems}
    for address, each in fitting.items():
        say(f"timing {address}")
        try:
            findings.probes[address] = probe(address, each, calls, local_links, metadata)
            findings.experts[address] = len(held_experts(each))
        except ConsiliumError as error:
            findings.problems[address] = f"does not answer as it should: {error}"
    if findings.probes:
        timings = [each.timing for each in findings.probes.values()]
        findings.verdict = _verdict(timings, fitting, model.config.top_k if model else top_k)
        here = {address: fitting[address] for address, each in findings.probes.items() if each.local_link}
        findings.verdict += explain_devices(here, mps.is_serving())
    if model is not None and (missing := _missing(fitting, model)):
        findings.problems["model"] = f"no worker that fits holds {missing} of its experts; start workers that do"
    return findings


def _verdict(timings: Sequence[Timing], workers: Mapping[str, Description], top_k: int | None) -> list[str]:
    if top_k is None:
        return ["How many experts a token uses is not known here: name the model with --model, or give --top-k."]
    held: dict[int, set[int]] = {}
    for worker in workers.values():
        for layer in worker.layers:
            held.setdefault(layer.layer, set()).update(layer.experts)
    experts = max(len(each) for each in held.values())
    largest = max(len(layer.experts) for worker in workers.values() for layer in worker.layers)
    first = next(iter(workers.values()))
    returned = first.hidden_size * TORCH_DTYPES[first.row_dtype].itemsize
    sent = first.hidden_size + SCALE_BYTES if has_integer_rows(first.quantization) else returned
    split = Split(len(held), experts, min(top_k, experts), -(-experts // largest), sent, returned)
    return explain(timings, split)


def _missing(workers: Mapping[str, Description], model: ModelFolder) -> int:
    """How many (layer, expert) pairs of the model nobody holds."""
    held = {place for each in workers.values() for place in held_experts(each)}
    wanted = ((layer, expert) for layer in model.config.expert_layers() for expert in range(model.config.num_experts))
    return sum(place not in held for place in wanted)


def _resolve(endpoint: str) -> list[str]:
    """The addresses of an endpoint: several are replicas. Raises OSError."""
    host, port = split_endpoint(endpoint)
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = sorted({(family, str(address[0])) for family, _, _, _, address in infos})
    first = hosts[0][0]  # one process often listens on both kinds of address; it is one worker
    return [f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for family, name in hosts if family == first]
