"""POST /v1/completions: text that goes on where the prompt ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from gateway.answer import Answer
from gateway.choice import Choice, ChoiceOptions, Delta, Prompt
from gateway.dependencies import GatewayOf, body_of, key_id
from gateway.job import Job
from gateway.logprobs import LogprobsFormat
from gateway.schemas import CompletionBody, check_token_ids
from gateway.state import Gateway

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(
    request: Request, gateway: GatewayOf, body: Annotated[CompletionBody, Depends(body_of(CompletionBody))]
) -> Response:
    """The continuation of one or several prompts, n times each."""
    gateway.model.check_name(body.model)
    gateway.check_count(len(body.prompt) * body.n)
    prompts = await _prompts(gateway, body)
    for prompt in prompts:
        gateway.check_length(prompt, body.max_tokens)
    sampling = body.sampling(body.max_tokens, gateway.model.vocab_size, body.logprobs, body.wanted_prompt_logprobs())
    options = ChoiceOptions(
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
        echo=body.echo,
        logprobs=body.logprobs is not None,
    )
    resumed = body.resumed(body.max_tokens, gateway.model.vocab_size, len(prompts))
    caller = body.caller(key_id(request))
    job = Job.plan(gateway, prompts, body.n, sampling, options, request.state.arrival, caller, resumed)
    return await _CompletionAnswer(request, job, body).response()


async def _prompts(gateway: Gateway, body: CompletionBody) -> list[Prompt]:
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        return await gateway.encode(texts, body.add_special_tokens)
    ids = [prompt for prompt in body.prompt if isinstance(prompt, list)]
    return [Prompt(check_token_ids(each, gateway.model.vocab_size, "prompt")) for each in ids]


class _CompletionAnswer(Answer):
    id_prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def __init__(self, request: Request, job: Job, body: CompletionBody) -> None:
        super().__init__(request, job, body, body.logprobs)
        self._prompt_logprobs = (
            None
            if body.prompt_logprobs is None
            else LogprobsFormat(job.gateway.model.tokenizer.vocabulary, body.prompt_logprobs)
        )

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        written = self._choice(choice, delta)
        if self._prompt_logprobs is not None:
            written["prompt_logprobs"] = self._prompt_logprobs.prompt(choice.prompt_logprobs)
        return written

    def chunks(self, choice: Choice, delta: Delta) -> Iterator[dict[str, Any]]:
        yield self._choice(choice, delta)

    def _choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": delta.text,
            "logprobs": None if self.logprobs is None else self.logprobs.completion(delta.entries),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **choice.extensions(),
            **self.token_ids(delta),
        }
