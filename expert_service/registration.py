"""A worker under a router: it registers, says that it lives, and holds what it is told to hold.

Loading happens on a thread of its own while calls are answered; the weights of a call that is being computed stay until
it is done, whatever is dropped meanwhile. Without its router a worker goes on with what it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from consilium.errors import ConfigError, ConsiliumError, NotReady
from consilium.rpc import from_rpc_error, router_channel_options
from consilium.tokens import Metadata
from expert_service.holdings import Expert, Holdings, expert_sets
from expert_service.tokens import Tokens
from protos.router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

RPC_SECONDS = 5.0
RETRY_SECONDS = 0.5  # between attempts to reach the router
DRAIN_POLL_SECONDS = 0.2
REPORT_SECONDS = 0.5  # while much is loaded, the router hears of it so often
_REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Registration:
    """One worker's standing with its router."""

    def __init__(
        self, endpoint: str, metadata: Metadata, worker: router_pb2.Worker, holdings: Holdings, tokens: Tokens
    ) -> None:
        """``metadata`` says who this is; ``tokens`` takes the digests of whom to answer."""
        self._target, self._metadata = endpoint.removeprefix("grpc://"), metadata
        self._worker, self._holdings, self._tokens = worker, holdings, tokens
        self._wanted: frozenset[Expert] | None = None  # None until the router has said something
        self._failed: set[Expert] = set()
        self._told = (-1, 0)  # the version of the holdings that the router knows, and how many it knows to have failed
        self._interval = RETRY_SECONDS
        self._news, self._orders = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def running(self, stopping: asyncio.Event) -> AsyncIterator[None]:
        """Register, then live as the router says; without, where ``stopping`` is set before there is one.

        Raises ConfigError when the router refuses this worker.
        """
        async with grpc.aio.insecure_channel(self._target, options=router_channel_options()) as channel:
            self._stub = router_pb2_grpc.RouterServiceStub(channel)
            await self._enter(stopping)
            tasks = (
                [asyncio.ensure_future(self._beat()), asyncio.ensure_future(self._obey())] if self._registered else []
            )
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, seconds: float) -> None:
        """Return when nobody needs this worker any more, or after ``seconds``, or where there is no router to ask."""
        if not self._registered:
            return
        said = self._worker.description
        request = router_pb2.DrainRequest(worker_id=said.worker_id, weight_version=said.weight_version)
        last_copies = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        answer = await self._stub.Drain(request, timeout=RPC_SECONDS, metadata=self._metadata)
                    except grpc.aio.AioRpcError as error:
                        logger.warning("leaving without the router: %s", from_rpc_error(error).message)
                        return
                    if answer.done:
                        return
                    last_copies = answer.last_copies
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        if last_copies:
            logger.warning("leaving with %d experts that nobody else holds: there was no room, or no time", last_copies)
        else:
            logger.warning("leaving although some gateway has not said that it asks others instead")

    @property
    def _registered(self) -> bool:
        return self._wanted is not None

    async def _enter(self, stopping: asyncio.Event) -> None:
        """Register; again and again while there is no router."""
        reported = ""
        while not (self._registered or stopping.is_set()):
            try:
                await self._register()
                return
            except grpc.aio.AioRpcError as error:
                if error.code() in _REFUSALS:
                    raise ConfigError(f"the router at {self._target}: {from_rpc_error(error).message}") from None
                message = from_rpc_error(error).message
                if message != reported:
                    logger.warning("the router at %s cannot be reached: %s", self._target, message)
                reported = message
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), RETRY_SECONDS)

    async def _register(self) -> None:
        version, held = self._version, self._holdings.describe()
        request = router_pb2.RegisterRequest(worker=self._worker, held=held, failed=expert_sets(self._failed))
        answer = await self._stub.Register(request, timeout=RPC_SECONDS, metadata=self._metadata)
        self._tokens.learn(answer.token_digests)
        self._take(answer.orders, version)
        logger.info("registered with the router at %s", self._target)

    async def _beat(self) -> None:
        """Heartbeats; one at once when there is news. Registers again where the router does not know this worker."""
        reported = ""
        while True:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._interval)
            try:
                await self._heartbeat()
                reported = ""
            except grpc.aio.AioRpcError as error:
                message = from_rpc_error(error).message
                if message != reported:
                    logger.warning("no heartbeat: %s", message)
                reported = message
                await asyncio.sleep(min(RETRY_SECONDS, self._interval))

    async def _heartbeat(self) -> None:
        version, held = self._version, None
        if version != self._told:
            held = router_pb2.Held(layers=self._holdings.describe(), failed=expert_sets(self._failed))
        said = self._worker.description
        request = router_pb2.HeartbeatRequest(worker_id=said.worker_id, weight_version=said.weight_version, held=held)
        try:
            answer = await self._stub.Heartbeat(request, timeout=RPC_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            await self._register()
        else:
            self._take(answer.orders, version)

    @property
    def _version(self) -> tuple[int, int]:
        return self._holdings.version, len(self._failed)

    def _take(self, orders: router_pb2.Orders, version: tuple[int, int]) -> None:
        self._told, self._interval = version, orders.interval_ms / 1e3
        self._wanted = frozenset((each.layer, expert) for each in orders.wanted for expert in each.experts)
        self._orders.set()

    async def _obey(self) -> None:
        """Load what is wanted, one expert after the other, and drop what is not."""
        loop, unavailable = asyncio.get_running_loop(), ""
        while True:
            await self._orders.wait()
            self._orders.clear()
            reported = loop.time()
            while (expert := self._next()) is not None:
                try:
                    await asyncio.to_thread(self._holdings.load, expert)
                except NotReady as error:  # with another worker, or later
                    if error.message != unavailable:
                        logger.warning("%s; asking again", error.message)
                    unavailable = error.message
                    loop.call_later(RETRY_SECONDS, self._orders.set)
                    break
                except ConsiliumError as error:
                    self._failed.add(expert)
                    logger.error("expert %d of layer %d cannot be loaded: %s", expert[1], expert[0], error.message)
                if loop.time() - reported > REPORT_SECONDS:
                    self._news.set()
                    reported = loop.time()
            if self._version != self._told:
                self._news.set()

    def _next(self) -> Expert | None:
        """The next expert to load; drops at once what is not wanted (any more)."""
        if self._wanted is None:
            return None
        held = self._holdings.held()
        for expert in held - self._wanted:
            self._holdings.drop(expert)
        return min(self._wanted - held - self._failed, default=None)
