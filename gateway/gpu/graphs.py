"""CUDA graphs: what a step launches, recorded once for each shape of step, and launched again as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T")


class Graphs:
    """Recordings by key. What is recorded reads and writes tensors that stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: Hashable, launch: Callable[[], T]) -> T:
        """What ``launch`` returns: it is first run, which compiles kernels, then recorded, then only replayed."""
        if not self.enabled:
            return launch()
        if key not in self._seen:
            self._seen.add(key)
            return launch()
        if key not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = launch()
            self._recorded[key] = graph, found
        graph, found = self._recorded[key]  # type: ignore[assignment]  # what this key's launch returned
        graph.replay()
        return found
