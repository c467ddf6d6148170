"""Run in hivemind's own environment: the round trip of a remote expert that computes nothing, one JSON line a size."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from hivemind import DHT
from hivemind.moe.client.expert import create_remote_experts
from hivemind.moe.expert_uid import ExpertInfo
from hivemind.moe.server import background_server

HIDDEN = 2048
ROWS = (1, 64, 512)  # float32: 8 KiB, 512 KiB, 4 MiB each way
WARMUP, CALLS = 10, 50


def main(repeats: int) -> None:
    """Server and client are processes of their own; hivemind's daemons (libp2p) are between them."""
    torch.set_num_threads(1)
    server = {"expert_uids": ["expert.0"], "expert_cls": "nop", "hidden_dim": HIDDEN, "num_handlers": 1}
    with background_server(**server, device="cpu") as peer, torch.no_grad():
        dht = DHT(initial_peers=peer.addrs, client_mode=True, start=True)
        [expert] = create_remote_experts([ExpertInfo("expert.0", peer.peer_id)], dht)
        for rows in ROWS * repeats:
            x, times = torch.randn(rows, HIDDEN), []
            for _ in range(WARMUP + CALLS):
                start = time.perf_counter()
                expert(x)
                times.append(time.perf_counter() - start)
            print(json.dumps({"rows": rows, "p50": statistics.median(times[WARMUP:])}), flush=True)
        dht.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
