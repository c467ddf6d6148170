"""How long work on a device takes, without what the host needs to launch it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS, SECONDS = 7, 0.02  # of a graph; and about how long one of them shall take


def seconds_of(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """For one of ``calls``, which do the same with other data: caches shall not know it. The median of several runs.

    On a GPU they are captured as one graph, which is replayed.
    """
    if device.type != "cuda":
        return _on_host(calls)
    for call in calls:  # compiled, and memory for their results is there
        call()
    once = _replayed(_captured(calls), 1) / len(calls)
    graph, repeats = _captured(calls), max(1, int(SECONDS / (once * len(calls))))
    return statistics.median(_replayed(graph, repeats) for _ in range(REPLAYS)) / len(calls)


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """Seconds of one replay."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(repeats):
        graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / repeats


def _on_host(calls: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) / len(calls)
