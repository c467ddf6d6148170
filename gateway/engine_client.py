"""The HTTP process's side of the socket to the engine process: sequences go out, tokens come back.

Nothing here waits for a slow reader: a sequence has at most ``max_tokens`` news, and the number of sequences that are
open at once is bounded.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from consilium.errors import ConsiliumError, NotReady, Overloaded
from gateway.generation import Generation
from gateway.messages import (
    LENGTH_BYTES,
    Abort,
    Caller,
    EngineStats,
    Generate,
    Output,
    Report,
    SamplingParams,
    Status,
    Step,
    ToEngine,
    pack,
    unpack,
)

log = logging.getLogger(__name__)

_LARGEST_MESSAGE = 2**30
_KEY_TIMES_FREE, _USER_TIMES_FREE = 63, 15  # a key leaves 1 of 64 places to others, a user 1 of 16
_ENGINE_GONE = "the engine process has ended; this gateway is stopping, send the request to another one"


@dataclass(frozen=True, slots=True)
class NewSequence:
    """One choice of one request, before it has an id."""

    prompt: list[int]
    sampling: SamplingParams
    choice: int
    resumed: list[int] = field(default_factory=list)  # tokens that another gateway has generated


class EngineClient:
    """Gives out ids, hands every request its own news, and knows the engine's last status and statistics."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        capacity: int,
        on_step: Callable[[EngineStats], None] = lambda _: None,
        on_status: Callable[[Status], None] = lambda _: None,
        on_report: Callable[[Report], None] = lambda _: None,
    ) -> None:
        self.capacity = capacity  # most sequences open at once
        self.status: Status | None = None
        self.stats: EngineStats | None = None
        self.draining = False
        self.loaded = asyncio.Event()  # its weights were read and found right
        self.gone = asyncio.Event()  # the engine has ended
        self.idle = asyncio.Event()  # no sequence is open
        self.idle.set()
        self._reader, self._writer = reader, writer
        self._on_step, self._on_status, self._on_report = on_step, on_status, on_report
        self._ids = itertools.count(1)
        self._open: dict[int, Generation] = {}
        self._callers: dict[int, Caller] = {}  # of the same sequences
        self._held: Counter[tuple[str, ...]] = Counter()  # how many are open of each key, and of each user of a key
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def connect(
        cls,
        connection: socket.socket,
        capacity: int,
        on_step: Callable[[EngineStats], None] = lambda _: None,
        on_status: Callable[[Status], None] = lambda _: None,
        on_report: Callable[[Report], None] = lambda _: None,
    ) -> EngineClient:
        """A client over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        return cls(reader, writer, capacity, on_step, on_status, on_report)

    @property
    def open_sequences(self) -> int:
        return len(self._open)

    def why_not_ready(self) -> str | None:
        """One sentence for /ready, or None when requests are taken."""
        if self.gone.is_set():
            return _ENGINE_GONE
        if self.draining:
            return "this gateway is shutting down and finishes what is running; send the request to another one"
        if self.status is None:
            return "the engine is loading the model"
        return None if self.status.ready else self.status.detail

    def open(self, sequences: Sequence[NewSequence], caller: Caller) -> Generation:
        """Start all the sequences of one request, or none. Raises NotReady and Overloaded."""
        reason = self.why_not_ready()
        if reason is not None:
            raise NotReady(reason)
        if len(self._open) + len(sequences) > self.capacity:
            raise Overloaded(f"{len(self._open)} of {self.capacity} sequences are running or queued; try again shortly")
        self._check_share(len(sequences), caller)
        ids = list(itertools.islice(self._ids, len(sequences)))
        generation = Generation(ids, self.abort)
        for sequence_id, new in zip(ids, sequences, strict=True):
            self._open[sequence_id] = generation
            self._callers[sequence_id] = caller
            self._held.update(_owners(caller))
            self._send(Generate(sequence_id, new.prompt, new.sampling, new.choice, caller, new.resumed))
        self.idle.clear()
        return generation

    def abort(self, sequence_id: int) -> None:
        """Tell the engine that nobody waits for this sequence any more."""
        if self._forget(sequence_id):
            self._send(Abort(sequence_id))

    def drain(self) -> None:
        """Take no more requests; what is open goes on."""
        self.draining = True

    async def close(self) -> None:
        """Fail what is still open and close the socket, which ends the engine."""
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    def _check_share(self, more: int, caller: Caller) -> None:
        """Raise Overloaded for a client that would take the last places from all the others.

        Nobody may hold more than so many times what is free (dynamic thresholds, Choudhury and Hahne 1998): the more
        the others hold, the less one may take, and some places are always left for whoever comes next.
        """
        free = self.capacity - len(self._open)
        for owner, times in zip(_owners(caller), (_KEY_TIMES_FREE, _USER_TIMES_FREE), strict=True):
            if self._held[owner] + more > times * free:
                raise Overloaded(
                    f"{self._held[owner]} of {self.capacity} sequences are running or queued for this client, and the "
                    "last places are left to others; try again shortly"
                )

    def _send(self, message: ToEngine) -> None:
        if not self.gone.is_set():
            self._writer.write(pack(message))

    async def _listen(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
                if size > _LARGEST_MESSAGE:
                    raise ValueError(f"a message of {size} bytes")
                self._handle(unpack(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the engine has ended; the server says so, with its exit status
        except (ValidationError, ValueError) as error:
            log.error("the engine sent a message that makes no sense: %s", type(error).__name__)
        finally:
            self.gone.set()
            self._fail_open(NotReady(_ENGINE_GONE))
            self._writer.close()

    def _handle(self, message: object) -> None:
        if isinstance(message, Step):
            self.stats = message.stats
            self._on_step(message.stats)
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Status):
            self.status = message
            self.loaded.set()
            self._on_status(message)
        elif isinstance(message, Report):
            self._on_report(message)
        else:
            raise ValueError(f"{type(message).__name__} from the engine")

    def _deliver(self, output: Output) -> None:
        generation = self._open.get(output.id)
        if generation is None:
            return  # aborted in the meantime
        generation.deliver(output)
        if output.finish_reason is not None:
            self._forget(output.id)

    def _forget(self, sequence_id: int) -> bool:
        known = self._open.pop(sequence_id, None) is not None
        if known:
            self._held.subtract(_owners(self._callers.pop(sequence_id)))
            self._held += Counter()  # without those that have nothing open any more
        if not self._open:
            self.idle.set()
        return known

    def _fail_open(self, error: ConsiliumError) -> None:
        for generation in set(self._open.values()):
            generation.fail(error)
        self._open.clear()
        self._callers.clear()
        self._held.clear()
        self.idle.set()


def _owners(caller: Caller) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whose places a sequence takes: the key's, and the user's of this key."""
    return (caller.api_key,), (caller.api_key, caller.user)
