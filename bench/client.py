"""One streamed request as its client sees it: when the first token came, and how long each later one took."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

END_OF_STREAM = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Request:
    """A body to post to ``path``; the answer must have ``output_tokens`` tokens."""

    path: str
    body: dict[str, Any]
    output_tokens: int


@dataclass(slots=True)
class Sample:
    """What one request took, in seconds from when it was sent."""

    latency: float = 0.0
    token_times: list[float] = field(default_factory=list)  # when each piece of text came
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    def time_to_first_token(self) -> float:
        """Seconds until the first piece of text."""
        return self.token_times[0]

    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next. Pieces that arrive together are 0 apart."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


async def measure(client: httpx.AsyncClient, request: Request) -> Sample:
    """Send ``request`` and read its stream to the end; whatever goes wrong is the sample's ``error``."""
    sample = Sample()
    start = time.perf_counter()
    try:
        async with client.stream("POST", request.path, json=request.body) as response:
            if response.status_code != 200:
                sample.error = f"HTTP {response.status_code}"
                return sample
            ended = False
            async for arrival, data in events(response):
                ended = data == END_OF_STREAM
                if not ended:
                    _record(sample, json.loads(data), arrival - start)
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        sample.error = type(error).__name__
        return sample
    sample.latency = time.perf_counter() - start
    if sample.error is None:
        sample.error = _incomplete(sample, request, ended)
    return sample


async def events(response: httpx.Response) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each server-sent event, and when (perf_counter) its last byte came."""
    rest = b""
    async for chunk in response.aiter_raw():
        arrival = time.perf_counter()
        *complete, rest = (rest + chunk).split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: "):
                yield arrival, event[6:]


def _record(sample: Sample, event: dict[str, Any], elapsed: float) -> None:
    if "error" in event:
        sample.error = f"error event: {event['error'].get('type')}"
    if usage := event.get("usage"):
        sample.prompt_tokens, sample.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices", ()):
        if choice.get("text") or choice.get("delta", {}).get("content"):
            sample.token_times.append(elapsed)


def _incomplete(sample: Sample, request: Request, ended: bool) -> str | None:
    if not ended:
        return "the stream broke off"
    if sample.completion_tokens != request.output_tokens:
        return f"{sample.completion_tokens} tokens instead of {request.output_tokens}"
    return None if sample.token_times else "no text"
