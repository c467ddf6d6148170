"""A stream that breaks goes on at another gateway: nothing is repeated, left out or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.completions import DEADLINE_SECONDS, events
from tests.stack import running, stack, wait_ready

PROMPT = [5, 17, 99, 40, 41, 42, 7]
SAMPLED = {
    "prompt": PROMPT,
    "max_tokens": 40,
    "temperature": 1.3,
    "seed": 11,
    "logprobs": 3,
    "presence_penalty": 0.7,
    "min_tokens": 5,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def gateways(tiny_mixtral: Path) -> Iterator[list[str]]:
    """The addresses of two, over the same workers."""
    with ExitStack() as cleanup:
        first = cleanup.enter_context(stack(tiny_mixtral, 2, quantization="int8"))
        second = cleanup.enter_context(running([*first.gateway.argv]))
        wait_ready(second)
        yield [first.url, second.address]


def stream(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What is told of the choice, event by event."""
    return [choice for event in events(url, {**body, "stream": True}) for choice in event["choices"]]


def whole(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """All of a choice that came in parts."""
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    lists = {key: [value for each in logprobs for value in each[key]] for key in logprobs[0]} if logprobs else None
    return {
        "text": "".join(part["text"] for part in parts),
        "token_ids": [token for part in parts for token in part["token_ids"]],
        "logprobs": lists,
        "finish_reason": parts[-1]["finish_reason"],
        "stop_reason": parts[-1]["stop_reason"],
    }


def test_a_retry_elsewhere_with_the_same_seed_gives_the_same(gateways: list[str]) -> None:
    first, second = (whole(stream(url, SAMPLED)) for url in gateways)
    assert first == second
    assert first["finish_reason"] == "length"


def stop_of(text: str) -> str:
    """A stop string late in ``text`` whose beginning comes before, so that something is held back."""
    return text[len(text) * 3 // 4 :][:3]


@pytest.mark.parametrize("change", [{}, {"temperature": 0}, {"stop": True}, {"logprobs": None}])
def test_a_stream_goes_on_elsewhere_wherever_it_broke(gateways: list[str], change: dict[str, Any]) -> None:
    body = {**SAMPLED, **change}
    if "stop" in change:
        body["stop"] = [stop_of(whole(stream(gateways[0], SAMPLED))["text"]), "never said"]
    undisturbed = stream(gateways[0], body)
    expected = whole(undisturbed)
    assert (expected["finish_reason"] == "stop") == ("stop" in change)
    assert len(undisturbed) > 8
    for cut in (1, 2, 5, len(undisturbed) // 2, len(undisturbed) - 1):
        seen = undisturbed[:cut]
        ids = [token for part in seen for token in part["token_ids"]]
        rest = stream(gateways[1], {**body, "consilium_resume_tokens": ids})
        assert whole(seen + rest) == expected
    asked = {**body, "consilium_resume_tokens": expected["token_ids"][:3]}
    answer = httpx.post(f"{gateways[1]}/v1/completions", json=asked, timeout=DEADLINE_SECONDS).json()
    assert answer["usage"]["completion_tokens"] == len(expected["token_ids"])
    assert answer["choices"][0]["token_ids"] == expected["token_ids"][3:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": None}, "needs the seed"),
        ({"n": 2}, "one choice"),
        ({"prompt": [PROMPT, PROMPT]}, "one prompt"),
        ({"max_tokens": 3, "min_tokens": 0}, "max_tokens is 3"),
        ({"consilium_resume_tokens": [10**6]}, "not in the vocabulary"),
    ],
)
def test_what_cannot_be_resumed_is_refused(gateways: list[str], change: dict[str, Any], told: str) -> None:
    body = {**SAMPLED, "consilium_resume_tokens": [5, 6, 7], **change}
    answer = httpx.post(f"{gateways[0]}/v1/completions", json=body, timeout=DEADLINE_SECONDS)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_a_chat_goes_on_without_a_second_role(gateways: list[str]) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        **{key: SAMPLED[key] for key in ("temperature", "seed", "return_token_ids")},
        "max_tokens": 12,
        "stream": True,
    }

    def chat(url: str, more: dict[str, Any]) -> list[dict[str, Any]]:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, **more}, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
        return [choice for line in lines for choice in httpx.Response(200, text=line).json()["choices"]]

    undisturbed = chat(gateways[0], {})
    ids = [token for part in undisturbed[:4] for token in part.get("token_ids", ())]
    rest = chat(gateways[1], {"consilium_resume_tokens": ids})
    assert undisturbed[4:] == rest
