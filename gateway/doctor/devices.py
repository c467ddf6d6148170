"""How steps of a gateway on a GPU of this machine reach the workers on its GPUs, in plain words. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.doctor.fit import Description

START = "start `nvidia-cuda-mps-control -d` before gateway and workers (`consilium up` starts one of its own)"


def explain_devices(workers: Mapping[str, Description], mps: bool) -> list[str]:
    """Of the ``workers`` (by address) that a local link reaches; ``mps`` is whether its daemon answers here."""
    sharing: dict[str, list[str]] = {}
    for address, each in workers.items():
        if each.device_uuid:
            sharing.setdefault(each.device_uuid, []).append(address)
    if not sharing:
        return []
    count = sum(map(len, sharing.values()))
    found = [
        f"A gateway on a GPU of this machine hands whole steps to {_count(count, 'worker')} on "
        f"{_count(len(sharing), 'GPU')} through device memory: no host waits between two layers."
    ]
    for uuid, addresses in sharing.items():
        who = f"{' and '.join(addresses)} {'use' if len(addresses) > 1 else 'uses'} {uuid}"
        if mps:
            found.append(f"{who}; a gateway there shares it through MPS, which is running.")
        else:
            found.append(
                f"{who}; without MPS processes on one GPU take turns, some 0.3 ms each, and a gateway there sends "
                f"frames through the host instead: {START}."
            )
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
