"""The load benchmark reads streams as they are: every token once, however the bytes are cut, and every failure seen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import httpx
import numpy as np
import pytest

from bench import tiers
from bench.client import Request, Sample, measure
from bench.figures import Level, summarize
from bench.serve import run_open

REQUEST = Request("/v1/completions", {}, output_tokens=2)
TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'
CHAT_TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
NO_TEXT = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


class Stream(httpx.AsyncByteStream):
    """Bytes in the pieces given."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


def measured(pieces: Sequence[bytes], status: int = 200) -> Sample:
    async def ask() -> Sample:
        transport = httpx.MockTransport(lambda _: httpx.Response(status, stream=Stream(pieces)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await measure(client, REQUEST)

    return asyncio.run(ask())


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("token", [TOKEN, CHAT_TOKEN])
def test_a_stream_in_pieces_of_any_size(token: bytes, size: int) -> None:
    whole = NO_TEXT + token + token + USAGE + DONE
    sample = measured([whole[start : start + size] for start in range(0, len(whole), size)])
    assert (sample.error, sample.prompt_tokens, sample.completion_tokens) == (None, 5, 2)
    assert len(sample.token_times) == 2
    assert len(sample.gaps()) == 1
    assert 0 < sample.time_to_first_token() <= sample.latency


@pytest.mark.parametrize(
    ("pieces", "status", "error"),
    [
        ([b""], 429, "HTTP 429"),
        ([TOKEN, USAGE], 200, "the stream broke off"),
        ([TOKEN, DONE], 200, "0 tokens instead of 2"),
        ([USAGE, DONE], 200, "no text"),
        ([TOKEN, b'data: {"error":{"type":"unavailable_error"}}\n\n'], 200, "error event: unavailable_error"),
        ([b"data: {\n\n"], 200, "JSONDecodeError"),
    ],
)
def test_failures_are_seen(pieces: Sequence[bytes], status: int, error: str) -> None:
    assert measured(pieces, status).error == error


def test_figures() -> None:
    good = [Sample(2.0, [0.5, 1.0, 2.0], 10, 3), Sample(4.0, [1.5, 4.0], 20, 2)]
    figures = summarize(Level(2, [*good, Sample(error="HTTP 503")], seconds=5.0, client_cpu_seconds=0.5))
    assert (figures["requests"], figures["errors"], figures["requests_per_second"]) == (3, {"HTTP 503": 1}, 0.4)
    assert (figures["output_tokens_per_second"], figures["total_tokens_per_second"]) == (1.0, 7.0)
    assert figures["time_to_first_token"]["p50"] == 1.0
    assert figures["inter_token_latency"]["max"] == 2.5
    assert figures["request_latency"]["mean"] == 3.0
    assert figures["client_cpu_share"] == 0.1


def test_no_request_succeeded() -> None:
    figures = summarize(Level(1, [Sample(error="HTTP 503")], seconds=1.0, client_cpu_seconds=0.0))
    assert figures["time_to_first_token"] is None
    assert figures["output_tokens_per_second"] == 0


def test_an_open_loop_waits_for_no_answer() -> None:
    """The server answers nothing until the last request has come: a closed loop would wait for ever."""

    async def ask() -> Level:
        all_here, seen = asyncio.Event(), 0

        async def answer(_: httpx.Request) -> httpx.Response:
            nonlocal seen
            seen += 1
            if seen == 20:
                all_here.set()
            await all_here.wait()
            return httpx.Response(200, stream=Stream([TOKEN + TOKEN + USAGE + DONE]))

        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as client:
            return await asyncio.wait_for(run_open(client, [REQUEST] * 20, 1000.0, random.Random(0)), 60)

    level = asyncio.run(ask())
    assert (level.concurrency, len(level.samples)) == (20, 20)
    assert all(sample.error is None for sample in level.samples)


def test_nothing_finds_more_than_foresight_and_taking_turns_defeats_the_least_recent() -> None:
    """Six layers of four experts, of which a token asks for two: one that most ask for, and any other."""
    random = np.random.default_rng(0)
    chosen = np.stack([np.zeros((6, 80), np.int64), random.integers(1, 4, (6, 80))], axis=2)
    found = tiers.compare(chosen, 4, share=1 / 3)
    assert found["LRU"] == 0
    assert 0.5 < found["LRFU 32"] <= found["foresight"] < 1
    assert tiers.compare(chosen, 4, share=1)["LRU"] == tiers.compare(chosen, 4, share=1)["LRFU 32"] == 1
