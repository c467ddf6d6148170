"""Greedy completions as token ids, and what /metrics says meanwhile."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

DEADLINE_SECONDS = 60.0


@dataclass
class Completion:
    """One choice: its tokens, and at each the log-probabilities of the two likeliest."""

    tokens: list[int] = field(default_factory=list)
    best_two: list[list[float]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take in a whole answer, or one event of a stream."""
        self.error = event.get("error")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if logprobs := choice["logprobs"]:
                self.tokens += [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
                self.best_two += [sorted(top.values(), reverse=True)[:2] for top in logprobs["top_logprobs"]]

    def assert_same(self, other: Completion) -> None:
        """Equal tokens, and equal log-probabilities to the last bit."""
        assert self.tokens == other.tokens
        assert self.best_two == other.best_two


def body_of(prompt: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
    """A greedy request for exactly ``max_tokens`` tokens, shown as ids with the two likeliest at each place."""
    shown: dict[str, Any] = {"logprobs": 2, "return_tokens_as_token_ids": True, "stream_options": None}
    if options.get("stream"):
        shown["stream_options"] = {"include_usage": True}
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **shown, **options}


def complete(url: str, prompt: list[int], max_tokens: int, *, stream: bool = False) -> Completion:
    """Ask and wait for the whole answer; a stream's events are put together."""
    completion = Completion()
    if stream:
        for event in events(url, body_of(prompt, max_tokens, stream=True)):
            completion.add(event)
    else:
        response = httpx.post(f"{url}/v1/completions", json=body_of(prompt, max_tokens), timeout=DEADLINE_SECONDS)
        completion.add(response.json())
    return completion


def events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a stream as they come, without the last, [DONE]; or the one answer that refuses it."""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=DEADLINE_SECONDS) as response:
        if response.is_error:
            yield json.loads(response.read())
            return
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def metric(url: str, name: str) -> float:
    """The sum of a metric's series."""
    text = httpx.get(f"{url}/metrics", timeout=DEADLINE_SECONDS).text
    values = re.findall(rf"^consilium_{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"no consilium_{name} in /metrics"
    return sum(map(float, values))


def await_metric(url: str, name: str, wanted: Callable[[float], bool]) -> None:
    """Poll /metrics until ``wanted`` holds for the metric; raises with its last value."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not wanted(value := metric(url, name)):
        assert time.monotonic() < deadline, f"consilium_{name} is still {value}"
        time.sleep(0.02)
