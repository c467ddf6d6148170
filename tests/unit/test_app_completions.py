"""The whole HTTP app over a fake engine: completions, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.messages import Abort, Caller, Generate
from tests.fake_engine import EOS, FakeStack, fake_stack, logprobs_of, say, spell, within

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stack(tokenizer_folder: Path) -> AsyncIterator[FakeStack]:
    async with fake_stack(tokenizer_folder) as stack:
        yield stack


async def complete(stack: FakeStack, **body: Any) -> dict[str, Any]:
    response = await within(stack.client.post("/v1/completions", json={"prompt": "Hello", **body}))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(stack: FakeStack, **body: Any) -> list[dict[str, Any]]:
    body = {"prompt": "Hello", "stream": True, **body}
    response = await within(stack.client.post("/v1/completions", json=body))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in events]


def texts(events: list[dict[str, Any]]) -> dict[int, str]:
    """What a stream says, by choice."""
    joined: dict[int, str] = {}
    for choice in (choice for each in events for choice in each["choices"]):
        joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def generates(stack: FakeStack) -> list[Generate]:
    return [each for each in stack.engine.received if isinstance(each, Generate)]


async def test_one_completion(stack: FakeStack) -> None:
    answer = await complete(stack, max_tokens=3)
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"] == [
        {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == usage(prompt=3, completion=3, cached=1)


async def test_several_prompts_with_several_choices_are_numbered_in_order(stack: FakeStack) -> None:
    answer = await complete(stack, prompt=["Hello", "the"], n=2, max_tokens=2)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [(0, "ab"), (1, "bc"), (2, "ab"), (3, "bc")]
    # A prompt counts once, its choices all.
    assert answer["usage"] == usage(prompt=4, completion=8, cached=1)
    assert [each.choice for each in generates(stack)] == [0, 1, 0, 1]
    assert len({each.sampling.seed for each in generates(stack)}) == 1


@pytest.mark.parametrize(("prompt", "ids"), [([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]])])
async def test_prompts_of_token_ids(stack: FakeStack, prompt: object, ids: list[list[int]]) -> None:
    await complete(stack, prompt=prompt, max_tokens=1)
    assert [each.prompt for each in generates(stack)] == ids


async def test_the_end_of_sequence_is_counted_and_not_shown(stack: FakeStack) -> None:
    stack.engine.script = say("so", then=(EOS,))
    answer = await complete(stack, logprobs=0, skip_special_tokens=False)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("so", "stop", None)
    assert answer["usage"]["completion_tokens"] == 3
    assert choice["logprobs"]["tokens"] == ["s", "o", "</s>"]


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
async def test_a_stop_token_is_shown_only_when_asked_for(stack: FakeStack, include: bool, text: str) -> None:
    (stop,) = spell("b")
    answer = await complete(stack, stop_token_ids=[stop], include_stop_str_in_output=include)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop)


@pytest.mark.parametrize(("include", "text"), [(False, "abc"), (True, "abcdef")])
async def test_a_stop_string_ends_the_sequence_in_the_engine(stack: FakeStack, include: bool, text: str) -> None:
    answer = await complete(stack, stop=["zzz", "def"], max_tokens=400, include_stop_str_in_output=include)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "def")
    assert answer["usage"]["completion_tokens"] == 6  # exactly those up to the end of the stop string
    await within(stack.engine.aborted.wait())
    assert stack.gateway.engine.open_sequences == 0


async def test_what_was_held_back_comes_out_at_the_end(stack: FakeStack) -> None:
    answer = await complete(stack, stop="def", max_tokens=5)
    assert answer["choices"][0]["text"] == "abcde"


async def test_stop_strings_do_not_count_before_the_minimum(stack: FakeStack) -> None:
    answer = await complete(stack, stop=["b", "d"], min_tokens=2, max_tokens=9)
    assert answer["choices"][0]["text"] == "abc"


async def test_characters_are_never_split(stack: FakeStack) -> None:
    stack.engine.script = say("日本🙂é")
    events = await stream(stack, max_tokens=12)
    assert [each["choices"][0]["text"] for each in events] == ["日", "本", "🙂", "é"]
    whole = await complete(stack, max_tokens=7)
    assert whole["choices"][0]["text"] == "日本\ufffd"


async def test_a_character_that_the_prompt_began_is_completed(stack: FakeStack) -> None:
    first, *rest = spell("日")
    stack.engine.script = lambda _: rest
    plain = await complete(stack, prompt=[*spell("a"), first])
    echoed = await complete(stack, prompt=[*spell("a"), first], echo=True, logprobs=0)
    assert (plain["choices"][0]["text"], echoed["choices"][0]["text"]) == ("日", "a日")
    assert echoed["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 1]


async def test_a_stream_says_the_same_as_the_whole(stack: FakeStack) -> None:
    body = {"prompt": ["Hello", "the"], "n": 2, "max_tokens": 5, "stop": ["def"], "logprobs": 2, "seed": 7}
    events = await stream(stack, **body, stream_options={"include_usage": True})
    whole = await complete(stack, **body)
    *chunks, last = events
    assert texts(chunks) == {each["index"]: each["text"] for each in whole["choices"]}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(each["usage"] is None for each in chunks)
    for choice in whole["choices"]:
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert [each["finish_reason"] for each in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for key, values in choice["logprobs"].items():
            assert [value for each in mine for value in each["logprobs"][key]] == values
    assert len({each["id"] for each in events}) == 1


async def test_without_include_usage_there_is_none(stack: FakeStack) -> None:
    events = await stream(stack, max_tokens=2)
    assert all("usage" not in each and len(each["choices"]) == 1 for each in events)


async def test_echo_with_logprobs_as_lm_eval_reads_it(stack: FakeStack) -> None:
    prompt = spell("Hi!")
    answer = await complete(stack, prompt=prompt, max_tokens=1, echo=True, logprobs=1, temperature=0)
    choice = answer["choices"][0]
    assert choice["text"] == "Hi!a"
    expected = [logprobs_of(token, 1) for token in (*prompt[1:], *spell("a"))]
    assert choice["logprobs"]["tokens"] == ["H", "i", "!", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, *(each.logprob for each in expected)]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert all(len(each) == 2 for each in choice["logprobs"]["top_logprobs"][1:])


async def test_echo_of_nothing_but_the_prompt(stack: FakeStack) -> None:
    answer = await complete(stack, prompt=[5, 6], max_tokens=0, echo=True, logprobs=2, return_tokens_as_token_ids=True)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"token_id:7": -1.0, "token_id:8": -2.0, "token_id:6": -3.006}]
    assert answer["usage"] == usage(prompt=2, completion=0, cached=1)


async def test_echo_repeats_a_text_as_it_was_sent(stack: FakeStack) -> None:
    text = "<|im_start|>user\nHi"  # the special token has no text of its own here
    events = await stream(stack, prompt=[text, "Hello"], echo=True, max_tokens=2)
    assert texts(events) == {0: text + "ab", 1: "Helloab"}


async def test_prompt_logprobs_by_id(stack: FakeStack) -> None:
    answer = await complete(stack, prompt=[5, 6], max_tokens=1, prompt_logprobs=1)
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert set(second) == {"6", "7"}
    assert answer["choices"][0]["logprobs"] is None


async def test_a_given_seed_reaches_the_engine_and_a_missing_one_is_drawn(stack: FakeStack) -> None:
    for seed in (7, 7, None, None):
        await complete(stack, max_tokens=1, seed=seed)
    first, second, third, fourth = [each.sampling.seed for each in generates(stack)]
    assert first == second == 7
    assert None not in (third, fourth)
    assert third != fourth


async def test_finished_sequences_are_not_aborted(stack: FakeStack) -> None:
    await complete(stack, max_tokens=2, n=3)
    assert not any(isinstance(each, Abort) for each in stack.engine.received)


async def test_the_engine_hears_whose_a_request_is_and_how_urgent(stack: FakeStack) -> None:
    await complete(stack, max_tokens=1)
    await complete(stack, max_tokens=1, user="me", priority=-3, n=2)
    stack.client.headers["authorization"] = "Bearer secret"
    await complete(stack, max_tokens=1, safety_identifier="you")
    nobody, mine, again, keyed = (each.caller for each in generates(stack))
    assert nobody == Caller()
    assert mine == again == Caller(user="me", priority=-3)
    assert (keyed.user, keyed.priority) == ("you", 0)
    assert keyed.api_key
    assert "secret" not in keyed.api_key
