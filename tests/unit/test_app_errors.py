"""The whole HTTP app over a fake engine: everything that goes wrong, and what the client is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from gateway.dependencies import MAX_BODY_BYTES
from gateway.messages import Abort, Failure, Generate
from tests.fake_engine import CONTEXT, VOCAB_SIZE, FakeStack, fake_stack, until, within

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest.fixture
async def stack(tokenizer_folder: Path) -> AsyncIterator[FakeStack]:
    async with fake_stack(tokenizer_folder, capacity=4) as stack:
        yield stack


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after its shape was checked."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


async def post(stack: FakeStack, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
    return await within(stack.client.post(path, json={"prompt": "Hello", **body} if path == COMPLETIONS else body))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 99}, "n"),
        ({"max_token": 1}, "max_token"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5] * (CONTEXT - 1), "max_tokens": 2}, "max_tokens"),
        ({"prompt": "x " * 100_000}, "prompt"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"prompt": ["a"] * 5}, "prompt"),
    ],
)
async def test_bad_requests_never_reach_the_engine(stack: FakeStack, body: dict[str, Any], param: str) -> None:
    error = error_of(await post(stack, **body), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert stack.engine.received == []
    assert stack.gateway.engine.open_sequences == 0


async def test_the_context_is_stated_in_numbers(stack: FakeStack) -> None:
    message = error_of(await post(stack, prompt=[5] * 500, max_tokens=13), 400)["message"]
    assert all(number in message for number in ("500", "13", str(CONTEXT)))
    assert (await post(stack, prompt=[5] * 500, max_tokens=12)).status_code == 200


async def test_what_fits_into_no_cache_is_refused(stack: FakeStack) -> None:
    stack.engine.say_ready(kv_tokens_total=100)
    await until(lambda: stack.gateway.context() == 100)
    assert "100" in error_of(await post(stack, prompt=[5] * 90, max_tokens=11), 400)["message"]
    assert (await post(stack, prompt=[5] * 90, max_tokens=10)).status_code == 200


async def test_a_chat_prompt_longer_than_the_context(stack: FakeStack) -> None:
    messages = [{"role": "user", "content": "qz" * CONTEXT}]
    error_of(await post(stack, CHAT, messages=messages), 400)


async def test_an_unknown_model(stack: FakeStack) -> None:
    for response in (await post(stack, model="gpt-4"), await stack.client.get("/v1/models/gpt-4")):
        error = error_of(response, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'tiny'" in error["message"]
    assert (await post(stack, model="tiny", max_tokens=1)).status_code == 200


async def test_unknown_routes_and_methods(stack: FakeStack) -> None:
    error_of(await stack.client.get("/v1/nothing"), 404)
    response = await stack.client.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_bodies_that_are_not_json(stack: FakeStack) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        error_of(await stack.client.post(COMPLETIONS, content=content, headers=headers), 400)
    form = await stack.client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert "Content-Type" in error_of(form, 400)["message"]


async def test_a_large_body_is_refused_before_it_is_read(stack: FakeStack) -> None:
    headers = {"content-type": "application/json", "content-length": str(MAX_BODY_BYTES + 1)}
    read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(2 * MAX_BODY_BYTES // 65536):
            read += 1
            yield b" " * 65536

    announced = await stack.client.post(COMPLETIONS, content=parts(), headers=headers)
    error_of(announced, 413)
    assert read <= 1
    streamed = await stack.client.post(COMPLETIONS, content=parts(), headers={"content-type": "application/json"})
    error_of(streamed, 413)
    assert read <= MAX_BODY_BYTES // 65536 + 3


async def test_keys(tokenizer_folder: Path) -> None:
    async with fake_stack(tokenizer_folder, api_keys=("first", "second")) as stack:
        routes = [(COMPLETIONS, "POST"), (CHAT, "POST"), ("/tokenize", "POST"), ("/detokenize", "POST")]
        routes += [(path, "GET") for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/version", "/load")]
        for path, method in routes:
            for key in (None, "Bearer ", "Bearer third", "Basic first", "first", "Bearer firstsecond", "Bearer ü"):
                headers = [] if key is None else [(b"authorization", key.encode())]
                response = await stack.client.request(method, path, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        for key in ("Bearer first", "bearer second"):
            assert (await stack.client.get("/v1/models", headers={"authorization": key})).status_code == 200
        assert [(await stack.client.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]


async def test_overload(stack: FakeStack) -> None:
    stack.engine.pause()
    first = asyncio.create_task(post(stack, n=3))
    await within(stack.engine.started.wait())
    response = await post(stack, n=2)
    assert error_of(response, 429)["type"] == "overloaded_error"
    assert int(response.headers["retry-after"]) >= 1
    second = asyncio.create_task(post(stack, n=1))
    stack.engine.resume()
    assert [(await each).status_code for each in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    ("failure", "status"),
    [("ExpertUnavailable", 503), ("InvalidRequest", 400), ("DeadlineExceeded", 504), ("Unheard", 500), ("Path", 500)],
)
async def test_a_failing_sequence_fails_the_request(stack: FakeStack, failure: str, status: int) -> None:
    stack.engine.failure = Failure(failure, "no worker holds expert 7")
    for stream in (False, True):
        response = await post(stack, stream=stream)
        if stream:
            first, error, rest = response.text.split("\n\n")
            assert "choices" in first
            assert json.loads(error.removeprefix("data: "))["error"]["message"] == "no worker holds expert 7"
            assert rest == ""  # and no [DONE]
        else:
            assert error_of(response, status)["message"] == "no worker holds expert 7"
    assert stack.gateway.engine.open_sequences == 0


async def test_a_stream_that_fails_before_its_first_token_has_a_status(stack: FakeStack) -> None:
    stack.engine.pause()
    for stream in (False, True):
        stack.engine.started.clear()
        answering = asyncio.create_task(post(stack, stream=stream))
        await within(stack.engine.started.wait())
        stack.engine.fail_now(Failure("ExpertUnavailable", "gone"))
        response = await answering
        assert error_of(response, 503)["type"] == "unavailable_error"
        assert response.headers["retry-after"]


async def test_while_not_ready(stack: FakeStack) -> None:
    stack.engine.say_ready(False, "no worker holds experts 0-3 of layer 1")
    await until(lambda: stack.gateway.engine.why_not_ready() is not None)
    for response in (await post(stack), await stack.client.get("/ready")):
        assert "experts 0-3" in error_of(response, 503)["message"]
        assert response.headers["retry-after"]
    assert (await stack.client.get("/health")).status_code == 200


async def test_while_draining_what_runs_goes_on(stack: FakeStack) -> None:
    stack.engine.pause()
    running = asyncio.create_task(post(stack, max_tokens=3))
    await within(stack.engine.started.wait())
    stack.gateway.engine.drain()
    error_of(await stack.client.get("/ready"), 503)
    error_of(await post(stack), 503)
    assert not stack.gateway.engine.idle.is_set()
    stack.engine.resume()
    assert (await running).json()["choices"][0]["text"] == "abc"
    assert stack.gateway.engine.idle.is_set()


async def test_the_last_places_are_left_to_others(tokenizer_folder: Path) -> None:
    async with fake_stack(tokenizer_folder, capacity=64) as stack:
        stack.engine.pause()
        greedy = [asyncio.create_task(post(stack, user="greedy")) for _ in range(60)]
        await until(lambda: stack.gateway.engine.open_sequences == 60)
        error = error_of(await post(stack, user="greedy"), 429)
        assert "60 of 64" in error["message"]
        assert "others" in error["message"]
        modest = asyncio.create_task(post(stack, user="modest"))
        await until(lambda: stack.gateway.engine.open_sequences == 61)
        stack.engine.resume()
        assert {each.status_code for each in await asyncio.gather(modest, *greedy)} == {200}
        # What has ended does not count.
        again = await asyncio.gather(*(post(stack, user="greedy") for _ in range(60)))
        assert {each.status_code for each in again} == {200}


async def test_the_death_of_the_engine_fails_every_open_request(stack: FakeStack) -> None:
    stack.engine.pause()
    whole = asyncio.create_task(post(stack))
    stream = asyncio.create_task(post(stack, stream=True))
    await until(lambda: stack.gateway.engine.open_sequences == 2)
    stack.engine.die()
    for response in (await whole, await stream, await post(stack), await stack.client.get("/ready")):
        assert "engine" in error_of(response, 503)["message"]
    assert stack.gateway.engine.gone.is_set()
    assert (await stack.client.get("/health")).status_code == 200


async def test_a_message_that_makes_no_sense_counts_as_the_engines_death(stack: FakeStack) -> None:
    stack.engine.send_raw(b"\x02\x00\x00\x00{}")
    await within(stack.gateway.engine.gone.wait())
    error_of(await post(stack), 503)


async def test_an_unexpected_error_says_nothing_of_the_inside(
    stack: FakeStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(stack.gateway.engine, "open", fail)
    response = await stack.client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "mine"})
    error = error_of(response, 500)
    assert "secret" not in json.dumps(error)
    assert "x-request-id" in error["message"]
    assert response.headers["x-request-id"] == "mine"
    assert any(record.exc_info for record in caplog.records)


async def leave_after(stack: FakeStack, body: dict[str, Any], parts: int) -> list[Message]:
    """Send a request as a server would, and disconnect after ``parts`` messages of the answer."""
    sent: list[Message] = []
    leaving = asyncio.Event()
    content = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        if content:
            return content.pop()
        await leaving.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == parts:
            leaving.set()
            await asyncio.Event().wait()  # a client that reads nothing any more

    headers = [(b"content-type", b"application/json")]
    request = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
    connection = {"http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "root_path": "", "raw_path": b""}
    answering = asyncio.ensure_future(stack.app({**request, **connection}, receive, send))
    if parts == 0:
        await within(stack.engine.started.wait())
        leaving.set()
    await within(answering)
    return sent


@pytest.mark.parametrize(("stream", "parts"), [(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)])
async def test_a_client_that_leaves_ends_its_sequences(stack: FakeStack, stream: bool, parts: int) -> None:
    if parts == 0:
        stack.engine.pause()
    await leave_after(stack, {"prompt": "Hello", "max_tokens": 400, "n": 2, "stream": stream}, parts)
    assert stack.gateway.engine.open_sequences == 0
    started = {each.id for each in stack.engine.received if isinstance(each, Generate)}
    await until(lambda: {each.id for each in stack.engine.received if isinstance(each, Abort)} == started)
    assert len(started) == 2
