"""How a job's answer goes out, whole or as a stream; the two OpenAI APIs differ only in the objects they write."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

from fastapi import Request, Response
from starlette.responses import JSONResponse

from gateway.choice import Choice, Delta
from gateway.job import Job
from gateway.logprobs import LogprobsFormat
from gateway.schemas import SamplingBody
from gateway.streaming import DONE, EventStream, event, until_disconnect


class Answer(ABC):
    """Writes the response objects of one request."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, request: Request, job: Job, body: SamplingBody, alternatives: int | None) -> None:
        model = job.gateway.model
        request.state.job = job  # for the log
        self.logprobs = (
            None
            if alternatives is None
            else LogprobsFormat(model.tokenizer.vocabulary, alternatives, body.return_tokens_as_token_ids)
        )
        self._with_ids = body.return_token_ids
        self._request = request
        self._job = job
        self._stream = body.stream
        self._include_usage = body.include_usage()
        self._head = {
            "id": f"{self.id_prefix}-{request.state.request_id}",
            "object": self.chunk_kind if body.stream else self.whole_kind,
            "created": int(time.time()),
            "model": model.name,
        }

    async def response(self) -> Response:
        """The HTTP response; the job runs, and ends early when the client leaves."""
        if self._stream:
            return EventStream(self._events())
        shown = await until_disconnect(self._request.receive, self._job.finish())
        choices = [self.whole(choice, delta) for choice, delta in zip(self._job.choices, shown, strict=True)]
        return JSONResponse({**self._head, "choices": choices, "usage": self._job.usage()})

    def token_ids(self, delta: Delta) -> dict[str, Any]:
        """The ids behind what is shown, where they are asked for: whoever has them can resume a stream that broke."""
        return {"token_ids": delta.tokens} if self._with_ids else {}

    @abstractmethod
    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A member of `choices` in an answer of one piece."""

    @abstractmethod
    def chunks(self, choice: Choice, delta: Delta) -> Iterator[dict[str, Any]]:
        """Members of `choices` in a stream, each in a chunk of its own."""

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """The stream's events; those of one step together."""
        usage = {"usage": None} if self._include_usage else {}
        async with aclosing(self._job.run()) as batches:
            async for deltas in batches:
                yield b"".join(
                    event({**self._head, "choices": [chunk], **usage})
                    for choice, delta in deltas
                    for chunk in self.chunks(choice, delta)
                )
        last = event({**self._head, "choices": [], "usage": self._job.usage()}) if self._include_usage else b""
        yield last + DONE
