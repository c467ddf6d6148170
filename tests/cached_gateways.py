"""Gateways with and without a cache over the same workers, for tests that compare what they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import Process, running, wait_ready

PROMPTS = [[(7 * i + 13 * n) % 380 + 2 for i in range(length)] for n, length in enumerate((1, 5, 40, 17))]
NEW_TOKENS = 8
# What all the prompts need once: a row in each of the tiny Mixtral's 3 layers, for every token but the last one, which
# nothing follows.
ROWS = sum(len(prompt) + NEW_TOKENS - 1 for prompt in PROMPTS) * 3
SETTLE_SECONDS = 60.0  # the longest that a change may take to show in the metrics


@dataclass(frozen=True)
class CachedGateway:
    """One gateway as a client reaches it."""

    process: Process

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """Tokens and all log-probabilities of a greedy completion; the same request gives the same dictionary."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 3, "echo": True, "return_tokens_as_token_ids": True, **options}
        response = httpx.post(f"{self.process.address}/v1/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def complete_all(self) -> list[dict[str, Any]]:
        """One after the other: alone in its batch, a request has the same shapes every time."""
        return [self.complete(prompt) for prompt in PROMPTS]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels."""
        text = httpx.get(f"{self.process.address}/metrics", timeout=30).text
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    def wait_for(self, condition: Callable[[], bool], busy: bool = False) -> None:
        """Return once the metrics show it; with requests meanwhile where only they make it happen."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.process.log()
            if busy:
                self.complete(PROMPTS[1], max_tokens=2)
            time.sleep(0.05)

    def breaker(self, operation: str) -> str:
        """The state the breaker is in."""
        name = "consilium_cache_breaker"
        states = [s for s in ("closed", "half_open", "open") if self.metric(name, operation=operation, state=s)]
        return states[0] if states else "unknown"

    def hits(self, tier: str) -> float:
        return self.metric("consilium_cache_hits_total", tier=tier)

    def misses(self, tier: str) -> float:
        return self.metric("consilium_cache_misses_total", tier=tier)

    def rows(self, tier: str) -> float:
        """Asked for so far."""
        return self.hits(tier) + self.misses(tier)

    def errors(self, operation: str, kind: str) -> float:
        return self.metric("consilium_cache_errors_total", operation=operation, kind=kind)

    def written(self) -> float:
        return self.metric("consilium_cache_written_rows_total")

    def settled(self, computed: float) -> bool:
        """Whether so many rows have been written, or given up."""
        return self.written() + self.metric("consilium_cache_dropped_rows_total") >= computed


@contextmanager
def plain_gateway(workers: Sequence[Process], model: Path, *arguments: str) -> Iterator[CachedGateway]:
    """A gateway of its own over running int8 ``workers``."""
    endpoints = [part for each in workers for part in ("--group-endpoint", f"experts={each.address}")]
    argv = ["gateway", "--model", str(model), "--port", "0", "--threads", "1", *endpoints, *arguments]
    with running(argv) as process:
        wait_ready(process)
        yield CachedGateway(process)


@contextmanager
def cached_gateway(
    workers: Sequence[Process], model: Path, folder: Path, cache: str, *arguments: str
) -> Iterator[CachedGateway]:
    """The same with a cache; ``cache`` is the text of its section in YAML, which is written to ``folder``."""
    file = folder / "cache.yaml"
    file.write_text(f"cache: {cache}\n")
    with plain_gateway(workers, model, "--config", str(file), *arguments) as gateway:
        yield gateway
