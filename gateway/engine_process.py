"""The engine's process: started by the HTTP process, which speaks to it over an inherited unix socket.

Two threads: this one computes, and blocks in its mailbox when there is nothing to compute; the I/O thread runs
asyncio for the socket's incoming messages and for the workers' connections.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.errors import ConfigError, ConsiliumError
from consilium.model_config import ModelConfig
from consilium.models import resolve_model
from consilium.telemetry import setup_logging
from consilium.tokens import GATEWAY, metadata_of
from consilium.wire import ROW_DTYPES, WIRE_DTYPES
from gateway.device import make_model
from gateway.dispatcher import Dispatcher
from gateway.engine import Engine
from gateway.expert_meter import ExpertCounts, ExpertMeter
from gateway.kv_store import KVStore
from gateway.local_experts import local_experts
from gateway.mailbox import Mailbox
from gateway.messages import LENGTH_BYTES, Abort, Generate, Status, ToHttp, WorkerStatus, pack, unpack
from gateway.micro_batches import MicroBatches
from gateway.model import Model
from gateway.pages import commit_small_pages
from gateway.placement import KnownExperts, describe_missing
from gateway.router_link import RouterLink
from gateway.scheduler import Scheduler
from gateway.worker_connection import REFUSED, Expectations
from gateway.worker_pool import View, WorkerPool

if TYPE_CHECKING:
    from gateway.cache.dispatcher import CachedDispatcher

log = logging.getLogger(__name__)

SEND_TIMEOUT = 60.0  # seconds that the HTTP process may read nothing before it counts as gone


@dataclass(frozen=True, slots=True)
class Closed:
    """The HTTP process is gone, or does not need the engine any more."""


class EngineProcess:
    """Everything in the process, wired together."""

    def __init__(self, link: socket.socket, config: Config) -> None:
        self._link = link
        # asyncio makes the socket non-blocking for both threads; with a timeout this one waits for room all the same.
        self._link.settimeout(SEND_TIMEOUT)
        self._config = config
        self._checkpoint = Checkpoint(resolve_model(config.model))
        reply_dtype = ROW_DTYPES[config.reply_dtype]
        _check_deployment(config, self._checkpoint.config)
        self._mailbox = Mailbox(self._handle)
        self._meter = ExpertMeter(self._checkpoint.config)
        local = partial(local_experts, config, self._checkpoint)
        self._dispatcher = Dispatcher(reply_dtype, config.gateway, self._meter, local)
        self._cache = self._make_cache(reply_dtype)
        source, clock = self._cache or self._dispatcher, self._dispatcher.clock
        model, pool = make_model(config, self._checkpoint, source, clock, self._meter)
        store = KVStore(pool, prefix_cache=config.gateway.prefix_cache)
        # On a GPU parts of a step are where the last one's were: one batch at a time.
        batches = config.gateway.micro_batches if isinstance(model, Model) else 1
        self._engine = Engine(
            model,
            Scheduler(store, config.gateway.max_running, config.gateway.max_step_tokens),
            self._dispatcher,
            self._mailbox,
            self._checkpoint.config.eos_token_ids,
            MicroBatches.of(self._checkpoint.config, batches),
        )
        self._known_experts = KnownExperts()
        self._view: View | None = None
        self._status: Status | None = None
        self._dispatcher.crew.on_change = self._report
        self._dispatcher.crew.on_liar = self._distrust
        self._goes_on = False  # requests are taken although experts are missing
        self._closed = False

    def run(self) -> None:
        """Serve until the HTTP process closes the socket."""
        io = threading.Thread(target=lambda: asyncio.run(self._io()), name="io", daemon=True)
        io.start()
        while not self._closed:
            while self._mailbox.receive(0 if self._engine.has_work else self._report_due_in()) and not self._closed:
                pass
            if self._engine.has_work and not self._closed:
                self._send(self._engine.step())
                self._engine.model.clock.mark("report")
            for reporter in self._reporters():
                report = reporter.take_report()
                if report is not None and not self._closed:
                    self._send(report)

    # -- this thread ---------------------------------------------------------------------------------------------

    def _handle(self, event: object) -> None:
        """One event from the mailbox; also between the layers of a step."""
        match event:
            case Generate():
                self._engine.add(event)
            case Abort(id=sequence_id):
                self._engine.abort(sequence_id)
            case View():
                self._dispatcher.follow(event.placement, event.workers, event.stated)
                self._engine.model.follow(event.placement, event.workers)
                if self._known_experts.differ(event.placement, event.identities):
                    log.info("other weights or another arithmetic than before: the prefix cache begins anew")
                    self._engine.scheduler.forget_prefixes()
                if self._cache is not None:
                    self._cache.set_identities(event.identities)
                self._view = event
                self._report()
            case Closed():
                self._closed = True
            case _:
                raise AssertionError(f"unknown event {event!r}")

    def _make_cache(self, dtype: torch.dtype) -> CachedDispatcher | None:
        if self._config.cache is None:
            return None
        from gateway.cache.dispatcher import make_cache  # brings redis-py, which takes 0.2 s to import

        return make_cache(self._config.cache, self._dispatcher, dtype, self._checkpoint.config, self._mailbox)

    def _reporters(self) -> list[ExpertMeter | CachedDispatcher]:
        return [self._meter] if self._cache is None else [self._meter, self._cache]

    def _report_due_in(self) -> float | None:
        """Seconds until something is to be told although nothing happens."""
        return min((due for each in self._reporters() if (due := each.due_in()) is not None), default=None)

    def _distrust(self) -> None:
        """A worker answered with wrong numbers: what was computed with them is not used again."""
        self._engine.scheduler.forget_prefixes()
        if self._cache is not None:
            self._cache.forget()

    def _report(self) -> None:
        if self._view is None:
            return
        local = self._config.gateway.local_experts
        missing = [] if local else self._dispatcher.placement.missing(self._checkpoint.config)
        # Who has been complete once can do without a worker, if it is to.
        self._goes_on |= not missing and self._config.gateway.last_replica != "fail"
        out = self._dispatcher.crew.out()
        statuses = [
            replace(each, detail=out[each.address], ejected=True) if each.address in out else each
            for each in self._view.statuses
        ]
        status = Status(
            ready=not missing or self._goes_on,
            detail=_explain(missing, statuses) if missing else "ready",
            workers=statuses,
            kv_tokens_total=self._engine.scheduler.store.pool.total_tokens,
            missing_experts=len(missing),
        )
        if status != self._status:
            before, self._status = self._status, status
            if before is None or before.detail != status.detail:  # numbers of experts move all the time
                log.log(logging.WARNING if before is not None and before.ready else logging.INFO, "%s", status.detail)
            self._send(status)

    def _send(self, message: ToHttp) -> None:
        try:
            self._link.sendall(pack(message))
        except OSError:
            self._closed = True

    # -- the I/O thread ------------------------------------------------------------------------------------------

    async def _io(self) -> None:
        checkpoint, config = self._checkpoint, self._config
        expectations = Expectations(
            model_fingerprint=checkpoint.fingerprint,
            quantization=config.quantization,
            row_dtype=WIRE_DTYPES[ROW_DTYPES[config.reply_dtype]],
            hidden_size=checkpoint.config.hidden_size,
            local_links=config.gateway.local_links,
            metadata=metadata_of(config.tokens, GATEWAY),
            weight_version=config.weight_version,
        )
        router = config.router if config.router is not None and config.router.endpoint is not None else None
        pool = WorkerPool(
            config.experts, config.worker.max_frame, checkpoint.config, expectations, self._mailbox, router
        )
        if pool.router is not None:
            self._meter.on_report = partial(_report_load, asyncio.get_running_loop(), pool.router)
        following = asyncio.ensure_future(pool.run())
        reading = asyncio.ensure_future(self._read())
        tasks = [following, reading]
        if self._cache is not None and self._cache.remote is not None:
            tasks.append(asyncio.ensure_future(self._cache.remote.run()))
        try:
            await asyncio.wait([following, reading], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("the I/O thread failed", exc_info=outcome)
            self._mailbox.post(Closed())

    async def _read(self) -> None:
        """Messages of the HTTP process, until it closes the socket."""
        reader, _ = await asyncio.open_unix_connection(sock=self._link.dup())
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
                self._mailbox.post(unpack(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return


def _report_load(loop: asyncio.AbstractEventLoop, router: RouterLink, counts: ExpertCounts) -> None:
    """From the engine's thread to the I/O thread."""
    loop.call_soon_threadsafe(router.report, counts)


def _explain(missing: list[tuple[int, int]], workers: list[WorkerStatus]) -> str:
    """Which experts nobody holds, and why the first worker that was refused is not used."""
    wrong = next((each for each in workers if each.detail.startswith(REFUSED)), None)
    return describe_missing(missing) + (f" (group {wrong.group}: {wrong.detail})" if wrong else "")


def _check_deployment(config: Config, model: ModelConfig) -> None:
    """Raises ConfigError for what would otherwise fail with the first request, or never become ready."""
    routed = config.router is not None and config.router.endpoint is not None
    if not config.experts and not routed and not config.gateway.local_experts:
        raise ConfigError(
            "experts: no group is configured; name at least one with its endpoint, grpc://HOST:PORT, or "
            "router.endpoint where a router knows the workers; or gateway.local_experts to compute them here"
        )
    row = model.hidden_size * ROW_DTYPES[config.reply_dtype].itemsize
    most = config.worker.max_frame // (row * model.top_k)
    if config.gateway.max_step_tokens > most:  # when one worker holds all the experts of a step's tokens
        raise ConfigError(
            f"gateway.max_step_tokens: the outputs of {config.gateway.max_step_tokens} tokens may pass "
            f"worker.max_frame; use at most {most}, or raise worker.max_frame here and in every worker"
        )


def read_config(link: socket.socket) -> Config:
    """The first frame on the socket. Raises EOFError when the other side is gone."""
    length = int.from_bytes(_read_exactly(link, LENGTH_BYTES), "little")
    return Config.model_validate_json(_read_exactly(link, length))


def _read_exactly(link: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = link.recv(length - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def main(argv: list[str]) -> int:
    """`python -m gateway.engine_process FD`."""
    commit_small_pages()
    # Ctrl-C reaches the whole terminal group: the HTTP process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = socket.socket(fileno=int(argv[0]))
    try:
        config = read_config(link)
        setup_logging("engine", config.log.level)
        if config.gateway.threads:
            torch.set_num_threads(config.gateway.threads)
        with torch.inference_mode():
            EngineProcess(link, config).run()
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except EOFError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
