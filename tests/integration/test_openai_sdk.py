"""The `openai` package as its users have it, unchanged, against a gateway and two workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletionMessageParam

from tests.stack import Stack, stack
from tests.tiny_models import save_mixtral

KEY = "sdk-test-key"
MODEL = "tiny-mixtral"
CAPACITY = 4  # sequences
CONTEXT = 100_000  # no test's request ends by itself before its client is done with it
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello there"},
]
PROMPT = "the experts meet and"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("sdk")
    model = save_mixtral(folder / MODEL, max_position_embeddings=CONTEXT)
    settings = folder / "gateway.yaml"
    settings.write_text(f"gateway: {{api_keys: [{KEY}], max_running: {CAPACITY - 1}, max_waiting: 1}}\n", "utf-8")
    with stack(model, workers=2, gateway_args=["--config", str(settings)]) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)


def complete(client: openai.OpenAI, **options: Any) -> Completion:
    completion: Completion = client.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 16, **options}
    )
    return completion


def counts(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Without what was found in the prefix cache: that is more the second time."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def plain(text: str) -> str:
    """A part of ``text`` that can serve as a stop string: some characters from its middle."""
    return text[len(text) // 2 : len(text) // 2 + 3]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "consilium"


def test_a_completion(client: openai.OpenAI) -> None:
    completion = complete(client)
    (choice,) = completion.choices
    assert choice.finish_reason == "length"
    assert choice.text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 16


def test_a_streamed_completion_says_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 11, "max_tokens": 24}
    whole = complete(client, **options)
    texts = {0: "", 1: ""}
    ends: dict[int, str] = {}
    usage = None
    for chunk in complete(client, **options, stream=True, stream_options={"include_usage": True}):
        assert isinstance(chunk, Completion)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert counts(usage) == counts(whole.usage)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, n=2, seed=5)
    texts = {0: "", 1: ""}
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=20,
            n=2,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]].count("assistant") == 2
    assert counts(chunks[-1].usage) == counts(whole.usage)


def test_a_prompt_that_begins_like_an_earlier_one_says_what_it_found(client: openai.OpenAI) -> None:
    first = list(range(100, 150))
    found = []
    for prompt in (first, first, [*first[:33], 200, 201]):
        usage = complete(client, prompt=prompt, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        found.append(usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 49, 33]  # one token of a prompt is always computed


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, stream: bool) -> None:
    free = complete(client, max_tokens=40).choices[0].text
    stop = plain(free)
    stopped = complete(client, max_tokens=40, stop=["never to be seen", stop], stream=stream)
    chunks = list(stopped) if stream else [stopped]
    choices = [chunk.choices[0] for chunk in chunks if isinstance(chunk, Completion)]
    assert "".join(choice.text for choice in choices) == free.partition(stop)[0]
    assert choices[-1].finish_reason == "stop"


def test_choices_depend_on_seed_and_number_alone(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1, "max_tokens": 12}
    alone = [choice.text for choice in complete(client, **options, seed=3).choices]
    beside = [choice.text for choice in complete(client, **options, seed=3, prompt=["one", PROMPT]).choices]
    other = [choice.text for choice in complete(client, **options, seed=4).choices]
    assert alone == beside[2:]
    assert len({*alone, *other}) == 4


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    completion = complete(client, logprobs=3, echo=True, max_tokens=4)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens[: completion.usage.prompt_tokens if completion.usage else 0]) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    # Greedy: each generated token is the likeliest one.
    for token, top in zip(logprobs.tokens[-4:], logprobs.top_logprobs[-4:], strict=True):
        assert max(top, key=lambda each: top[each]) == token


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    assert content is not None
    assert len(content) == 4
    text = b"".join(bytes(token.bytes or []) for token in content).decode(errors="replace")
    assert text == answer.choices[0].message.content
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    assert all(len(token.top_logprobs) == 2 for token in content)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": CONTEXT}, str(CONTEXT)),
        ({"temperature": 3}, "temperature"),
        ({"best_of": 3}, "best_of"),
        ({"extra_body": {"top_kk": 3}}, "top_k"),
    ],
)
def test_bad_requests(client: openai.OpenAI, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert said in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, model="gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_wrong_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        complete(client.with_options(api_key="another"))
    assert caught.value.code == "invalid_api_key"


def test_a_large_body(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        complete(client, prompt="x" * 2**21)
    assert caught.value.status_code == 413


def test_overload_and_the_retry_that_helps(client: openai.OpenAI) -> None:
    """While all places are taken others get 429; the SDK's own retries succeed once the first client has left."""
    with client.completions.create(
        model=MODEL, prompt=[5], max_tokens=CONTEXT - 1, n=CAPACITY, stream=True, extra_body={"ignore_eos": True}
    ) as taken:
        next(iter(taken))
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
    assert complete(client.with_options(max_retries=5)).choices[0].text
