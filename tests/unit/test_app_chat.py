"""The whole HTTP app over a fake engine: chat, tokenize, detokenize."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.messages import Generate
from tests.fake_engine import CONTEXT, EOS, VOCAB_SIZE, FakeStack, fake_stack, logprobs_of, say, spell, within
from tests.tiny_tokenizer import save_tokenizer

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello there"}]
TEXT = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
BOS_ID = 0


@pytest.fixture
async def stack(tokenizer_folder: Path) -> AsyncIterator[FakeStack]:
    async with fake_stack(tokenizer_folder) as stack:
        stack.engine.script = say("Hi!", then=(EOS,))
        yield stack


async def post(stack: FakeStack, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    response = await within(stack.client.post(path, json=body))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def the_request(stack: FakeStack) -> Generate:
    request = stack.engine.received[-1]
    assert isinstance(request, Generate)
    return request


def prompt_of(stack: FakeStack, request: Generate) -> str:
    return stack.gateway.model.tokenizer.vocabulary.decode(request.prompt, skip_special_tokens=False)


async def test_one_answer(stack: FakeStack) -> None:
    answer = await post(stack, messages=MESSAGES)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "Hi!", "refusal": None}
    ends = {"logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [{"index": 0, "message": message, **ends}]
    request = the_request(stack)
    assert prompt_of(stack, request) == TEXT
    prompt = len(request.prompt)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 4,
        "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
    }
    assert request.sampling.max_tokens == CONTEXT - prompt  # by default as many as fit


async def test_a_stream(stack: FakeStack) -> None:
    body = {"messages": MESSAGES, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = await stack.client.post("/v1/chat/completions", json=body)
    *events, done, _ = response.text.split("\n\n")
    *chunks, last = [json.loads(each.removeprefix("data: ")) for each in events]
    assert done == "data: [DONE]"
    assert {each["object"] for each in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        first, *rest = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert [each["delta"] for each in rest] == [{"content": "H"}, {"content": "i"}, {"content": "!"}, {}]
        assert [each["finish_reason"] for each in rest] == [None, None, None, "stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8


async def test_logprobs(stack: FakeStack) -> None:
    answer = await post(stack, messages=MESSAGES, logprobs=True, top_logprobs=1, max_completion_tokens=1)
    (token,) = spell("H")
    expected = logprobs_of(token, 1)
    (shown,) = answer["choices"][0]["logprobs"]["content"]
    assert (shown["token"], shown["logprob"], shown["bytes"]) == ("H", expected.logprob, [ord("H")])
    assert [each["token"] for each in shown["top_logprobs"]] == ["I"]


async def test_logprobs_without_alternatives(stack: FakeStack) -> None:
    answer = await post(stack, messages=MESSAGES, logprobs=True, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_a_final_message_goes_on(stack: FakeStack) -> None:
    messages = [MESSAGES[1], {"role": "assistant", "content": "The answer is "}]
    await post(stack, messages=messages, continue_final_message=True)
    assert prompt_of(stack, the_request(stack)).endswith("<|im_start|>assistant\nThe answer is")


async def test_no_special_token_is_added_to_what_the_template_wrote(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, VOCAB_SIZE)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}), "utf-8")
    async with fake_stack(tmp_path) as stack:
        await post(stack, messages=MESSAGES)
        assert prompt_of(stack, the_request(stack)) == TEXT
        assert (await post(stack, "/tokenize", messages=MESSAGES))["tokens"] == the_request(stack).prompt
        assert (await post(stack, "/tokenize", prompt="Hi"))["tokens"][0] == BOS_ID


async def test_tokenize_and_back(stack: FakeStack) -> None:
    text = "Hello 日本 <|im_end|>"
    tokenized = await post(stack, "/tokenize", prompt=text, return_token_strs=True)
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == CONTEXT
    assert (await post(stack, "/detokenize", tokens=tokenized["tokens"]))["prompt"] == text
    skipping = await post(stack, "/detokenize", tokens=tokenized["tokens"], skip_special_tokens=True)
    assert skipping["prompt"] == "Hello 日本 "
    assert await post(stack, "/tokenize", prompt="") == {"count": 0, "max_model_len": CONTEXT, "tokens": []}
