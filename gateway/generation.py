"""The open sequences of one request, between the engine's socket and the handler that answers the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from consilium import errors
from consilium.errors import ConsiliumError, NotReady
from gateway.messages import Failure, Output

News = tuple[int, Output]  # which of a request's sequences, and what is new of it


class Generation:
    """Sequences that share one queue of news. Leaving it, for whatever reason, aborts those that have not ended."""

    def __init__(self, ids: list[int], abort: Callable[[int], None]) -> None:
        self._abort = abort
        self._ids = ids
        self._positions = {sequence_id: position for position, sequence_id in enumerate(ids)}
        self._unfinished = set(range(len(ids)))
        self._news: asyncio.Queue[Output | ConsiliumError] = asyncio.Queue()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sequence_id in self._ids:
            self._abort(sequence_id)

    async def batches(self) -> AsyncIterator[list[News]]:
        """All news there are, again and again, until every sequence has ended.

        Raises the engine's error where a sequence failed, NotReady where the engine is gone.
        """
        while self._unfinished:
            arrived = [await self._news.get()]
            while not self._news.empty():
                arrived.append(self._news.get_nowait())
            batch: list[News] = []
            failure: ConsiliumError | None = None
            for each in arrived:
                if self._is_over(each):
                    continue
                failure = failure or _failure(each)
                if failure is None and isinstance(each, Output):
                    batch.append(self._note(each))
            if batch:
                yield batch  # what came before a failure is still shown
            if failure is not None:
                raise failure

    def abort(self, position: int) -> None:
        """End one sequence early; its remaining news may still come."""
        self._unfinished.discard(position)
        self._abort(self._ids[position])

    def deliver(self, output: Output) -> None:
        self._news.put_nowait(output)

    def fail(self, error: ConsiliumError) -> None:
        self._news.put_nowait(error)

    def _is_over(self, news: Output | ConsiliumError) -> bool:
        """Whether it is news of a choice that a stop string has ended for the client."""
        return isinstance(news, Output) and self._positions[news.id] not in self._unfinished

    def _note(self, output: Output) -> News:
        position = self._positions[output.id]
        if output.finish_reason is not None:
            self._unfinished.discard(position)
        return position, output


def _failure(news: Output | ConsiliumError) -> ConsiliumError | None:
    if isinstance(news, ConsiliumError):
        return news
    return _error_of(news.failure) if news.finish_reason in ("error", "abort") else None


def _error_of(failure: Failure | None) -> ConsiliumError:
    """The error that the engine names, from the one error tree."""
    if failure is None:
        return NotReady("the engine gave this request up; send it again")
    kind = getattr(errors, failure.error, None)
    if isinstance(kind, type) and issubclass(kind, ConsiliumError):
        return kind(failure.message)
    return ConsiliumError(failure.message)
