"""From the samples of one level to its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.client import Sample

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Level:
    """All requests at one concurrency."""

    concurrency: int
    samples: list[Sample]
    seconds: float  # from the first request sent to the last answer
    client_cpu_seconds: float  # what the load generator itself used meanwhile


def summarize(level: Level) -> dict[str, Any]:
    """The figures of ``level`` as JSON holds them; times are seconds, and only of requests without errors."""
    good = [sample for sample in level.samples if sample.error is None]
    output = sum(sample.completion_tokens for sample in good)
    prompt = sum(sample.prompt_tokens for sample in good)
    return {
        "concurrency": level.concurrency,
        "requests": len(level.samples),
        "errors": dict(Counter(sample.error for sample in level.samples if sample.error is not None)),
        "seconds": level.seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(good) / level.seconds,
        "output_tokens_per_second": output / level.seconds,
        "total_tokens_per_second": (prompt + output) / level.seconds,
        "time_to_first_token": distribution([sample.time_to_first_token() for sample in good]),
        "inter_token_latency": distribution([gap for sample in good for gap in sample.gaps()]),
        "request_latency": distribution([sample.latency for sample in good]),
        "client_cpu_share": level.client_cpu_seconds / level.seconds,
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{name}": float(value) for name, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": max(values)}
