"""An engine without a model: it speaks gateway/messages.py over a real socket pair and answers by script."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import SecretStr
from starlette.types import ASGIApp

from consilium.config import Config, GatewayConfig
from gateway.app import create_app
from gateway.chat_template import load_chat_template
from gateway.engine_client import EngineClient
from gateway.messages import (
    LENGTH_BYTES,
    Abort,
    EngineStats,
    Failure,
    Generate,
    Output,
    Status,
    Step,
    ToHttp,
    TokenLogprobs,
    WorkerStats,
    WorkerStatus,
    pack,
    unpack,
)
from gateway.metrics import Metrics
from gateway.served_model import ServedModel
from gateway.state import Gateway
from gateway.tokenizer import Tokenizer

T = TypeVar("T")

SECONDS = 30.0
VOCAB_SIZE = 384
CONTEXT = 512
EOS = 1
MODEL = "tiny"
WORKER = WorkerStatus("experts", "127.0.0.1:50051", connected=True, experts=12, transport="grpc")

Script = Callable[[Generate], list[int]]


# The bytes in the order of the tiny tokenizer's ids from 4 on: printable ones first.
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES += [byte for byte in range(256) if byte not in _BYTES]


def spell(text: str) -> list[int]:
    """The tiny tokenizer's ids of ``text``, one per byte of it."""
    return [4 + _BYTES.index(byte) for byte in text.encode()]


def count_up(request: Generate) -> list[int]:
    """abc… for choice 0, bcd… for choice 1, one letter a token, as many as were asked for."""
    letters = [chr(ord("a") + (request.choice + step) % 26) for step in range(request.sampling.max_tokens)]
    return spell("".join(letters))


def say(text: str, then: tuple[int, ...] = ()) -> Script:
    """The same text for every choice, byte by byte, and then some more tokens, for example EOS."""
    return lambda request: [*spell(text), *then][: request.sampling.max_tokens]


def logprobs_of(token: int, count: int) -> TokenLogprobs:
    """Made up, but always the same: the token itself is third among the likeliest."""
    top = [(token + 1) % VOCAB_SIZE, (token + 2) % VOCAB_SIZE, token][:count]
    return TokenLogprobs(token, -3.0 - token / 1000, top, [-1.0, -2.0, -3.0 - token / 1000][:count])


@dataclass
class _Sequence:
    request: Generate
    tokens: list[int]
    sent: int = 0


@dataclass
class FakeEngine:
    """One token per sequence and step. Tests set ``script``, ``paused`` and ``failure``, and read ``received``."""

    script: Script = count_up
    failure: Failure | None = None  # every sequence ends with it after its first token
    received: list[Generate | Abort] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)  # a Generate has come
    _running: dict[int, _Sequence] = field(default_factory=dict)
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _unpaused: asyncio.Event = field(default_factory=asyncio.Event)
    _writer: asyncio.StreamWriter | None = None

    def pause(self) -> None:
        """No steps until ``resume``."""
        self._unpaused.clear()

    def resume(self) -> None:
        self._unpaused.set()

    def send(self, message: ToHttp) -> None:
        self.send_raw(pack(message))

    def send_raw(self, content: bytes) -> None:
        assert self._writer is not None
        self._writer.write(content)

    def say_ready(self, ready: bool = True, detail: str = "ready", kv_tokens_total: int = 100_000) -> None:
        self.send(Status(ready, detail, [WORKER], kv_tokens_total))

    def fail_now(self, failure: Failure) -> None:
        """End every sequence with an error, whatever it has sent so far."""
        outputs = [Output(each, finish_reason="error", failure=failure) for each in self._running]
        self._running.clear()
        self.send(Step(outputs, EngineStats(0, 0, 0, 100_000)))

    def die(self) -> None:
        """As when the process ends: its end of the socket closes."""
        assert self._writer is not None
        self._writer.close()

    async def run(self, connection: socket.socket) -> None:
        """Serve until the other side closes."""
        reader, self._writer = await asyncio.open_unix_connection(sock=connection)
        self.resume()
        self.say_ready()
        stepping = asyncio.create_task(self._step_for_ever())
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
                self._take(unpack(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            stepping.cancel()
            self._writer.close()

    def _take(self, message: object) -> None:
        assert isinstance(message, Generate | Abort)
        self.received.append(message)
        if isinstance(message, Abort):
            self._running.pop(message.id, None)
            self.aborted.set()
        else:
            self._running[message.id] = _Sequence(message, self.script(message))
            self.started.set()
            self._work.set()

    async def _step_for_ever(self) -> None:
        while True:
            await self._work.wait()
            await self._unpaused.wait()
            outputs = [_advance(each, self.failure) for each in list(self._running.values())]
            for output in outputs:
                if output.finish_reason is not None:
                    del self._running[output.id]
            worker = WorkerStats(WORKER.group, WORKER.address, frames=1, rows=len(outputs), bytes_sent=100)
            generated = sum(output.token is not None for output in outputs)
            self.send(
                Step(
                    outputs,
                    EngineStats(
                        running=len(self._running),
                        waiting=0,
                        kv_tokens_used=7,
                        kv_tokens_total=100_000,
                        step_seconds=0.01,
                        generated_tokens=generated,
                        prefix_queries=40,
                        prefix_hits=30,
                        prefix_evicted=20,
                        prefix_tokens=10,
                        workers=[worker],
                        stages={"attention": 0.004, "compute": 0.006},
                    ),
                )
            )
            if not self._running:
                self._work.clear()
            await asyncio.sleep(0)


def _advance(sequence: _Sequence, failure: Failure | None) -> Output:
    """The next token of a sequence; the script's last one ends it with "length", an EOS with "stop"."""
    request, sampling = sequence.request, sequence.request.sampling
    news = Output(request.id)
    if sequence.sent == 0:
        count = sampling.prompt_logprobs
        reports = None if count is None else [logprobs_of(token, count) for token in request.prompt[1:]]
        news = replace(news, prompt_logprobs=reports, queue_seconds=0.5, cached_tokens=len(request.prompt) // 2)
    if sequence.sent == len(sequence.tokens):
        return replace(news, finish_reason="length")
    if sequence.sent and failure is not None:
        return replace(news, finish_reason="error", failure=failure)
    token = sequence.tokens[sequence.sent]
    sequence.sent += 1
    by_eos, by_id = token == EOS and not sampling.ignore_eos, token in sampling.stop_token_ids
    last = sequence.sent == len(sequence.tokens)
    return replace(
        news,
        token=token,
        logprobs=None if sampling.logprobs is None else logprobs_of(token, sampling.logprobs),
        finish_reason="stop" if by_eos or by_id else "length" if last else None,
        stop_reason="eos" if by_eos else str(token) if by_id else None,
    )


@dataclass
class FakeStack:
    """The whole HTTP app over a fake engine."""

    app: ASGIApp
    gateway: Gateway
    engine: FakeEngine
    client: httpx.AsyncClient


def make_model(folder: Path, name: str = MODEL) -> ServedModel:
    """What the HTTP process knows of a model whose folder holds only the tiny tokenizer."""
    tokenizer = Tokenizer(folder, VOCAB_SIZE)
    return ServedModel(name, tokenizer, load_chat_template(folder, tokenizer), VOCAB_SIZE, CONTEXT)


async def within(work: Awaitable[T]) -> T:
    """The result of ``work``; a test that would wait for ever fails instead."""
    return await asyncio.wait_for(work, SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Let the other coroutines of this process run until ``condition`` holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 (the state of the code under test has no event)
            await asyncio.sleep(0)


@asynccontextmanager
async def fake_stack(folder: Path, api_keys: tuple[str, ...] = (), capacity: int = 64) -> AsyncIterator[FakeStack]:
    """App, gateway and fake engine in this process, with a client that needs no network."""
    ours, theirs = socket.socketpair()
    engine = FakeEngine()
    running = asyncio.create_task(engine.run(theirs))
    metrics = Metrics(MODEL)
    told = asyncio.Event()

    def on_status(status: Status) -> None:
        metrics.status(status)
        told.set()

    client = await EngineClient.connect(ours, capacity, metrics.step, on_status, metrics.report)
    metrics.watch_ready(lambda: client.why_not_ready() is None)
    settings = GatewayConfig(api_keys=tuple(map(SecretStr, api_keys)))
    gateway = Gateway(Config(gateway=settings), make_model(folder), client, metrics)
    app = create_app(gateway)
    await told.wait()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield FakeStack(app, gateway, engine, http)
    await client.close()
    with contextlib.suppress(asyncio.CancelledError):
        await running
