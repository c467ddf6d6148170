"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from gateway.answer import Answer
from gateway.choice import Choice, ChoiceOptions, Delta
from gateway.dependencies import GatewayOf, body_of, key_id
from gateway.job import Job
from gateway.schemas import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(
    request: Request, gateway: GatewayOf, body: Annotated[ChatBody, Depends(body_of(ChatBody))]
) -> Response:
    """n answers to the last message."""
    gateway.model.check_name(body.model)
    gateway.check_count(body.n)
    # The template writes all special tokens itself.
    (prompt,) = await gateway.encode([gateway.model.render(body)], add_special_tokens=False)
    left = max(1, gateway.context() - len(prompt.ids))
    max_tokens = body.limit() or left
    gateway.check_length(prompt, max_tokens)
    sampling = body.sampling(max_tokens, gateway.model.vocab_size, body.wanted_logprobs())
    options = ChoiceOptions(
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
        logprobs=body.logprobs,
    )
    resumed, caller = body.resumed(max_tokens, gateway.model.vocab_size), body.caller(key_id(request))
    job = Job.plan(gateway, [prompt], body.n, sampling, options, request.state.arrival, caller, resumed)
    return await _ChatAnswer(request, job, body).response()


class _ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, request: Request, job: Job, body: ChatBody) -> None:
        super().__init__(request, job, body, body.wanted_logprobs())
        self._begun = {0} if body.consilium_resume_tokens else set[int]()  # choices whose role was sent

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": choice.index, "message": message, **self._rest(choice, delta)}

    def chunks(self, choice: Choice, delta: Delta) -> Iterator[dict[str, Any]]:
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            opening = {"role": "assistant", "content": ""}
            yield {"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}
        yield {
            "index": choice.index,
            "delta": {"content": delta.text} if delta.text else {},
            **self._rest(choice, delta),
        }

    def _rest(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "logprobs": None if self.logprobs is None else self.logprobs.chat(delta.entries),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **choice.extensions(),
            **self.token_ids(delta),
        }
