"""Every field of a request has bounds, and every refusal names its key."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from consilium.errors import InvalidRequest
from gateway.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body

MESSAGES = [{"role": "user", "content": "Hi"}]
VOCAB_SIZE = 100


def completion(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"prompt": "Hi", **fields}).encode())


def chat(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"messages": MESSAGES, **fields}).encode())


def refused(model: type[Body], content: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(model, json.dumps(content).encode())
    return caught.value


def test_defaults() -> None:
    body = completion()
    assert (body.n, body.temperature, body.max_tokens, body.logprobs, body.stream) == (1, 1.0, 16, None, False)
    assert chat().limit() is None
    assert chat().wanted_logprobs() is None


@pytest.mark.parametrize(
    ("field", "least", "most"),
    [
        ("n", 1, 16),
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("top_k", -1, 2**31 - 1),
        ("min_p", 0, 1),
        ("seed", -(2**63), 2**63 - 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 0.01, 10),
        ("min_tokens", 0, 2**31 - 1),
        ("max_tokens", 0, 2**31 - 1),
        ("logprobs", 0, 20),
        ("prompt_logprobs", 0, 20),
        ("priority", -1000, 1000),
    ],
)
def test_every_number_has_two_bounds(field: str, least: float, most: float) -> None:
    for inside in (least, most):
        assert getattr(completion(**{field: inside}), field) == inside
    for outside in (least - 1, most + 1):
        error = refused(CompletionBody, {"prompt": "Hi", field: outside})
        assert error.param == field
        assert str(outside) in error.message


@pytest.mark.parametrize("value", ["1", True, [], {}, 1.5])
@pytest.mark.parametrize("field", ["n", "max_tokens", "seed", "logprobs", "top_k"])
def test_whole_numbers_are_not_guessed(field: str, value: object) -> None:
    assert refused(CompletionBody, {"prompt": "Hi", field: value}).param == field


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"0.5"', b"true"])
def test_numbers_are_finite_numbers(text: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(CompletionBody, b'{"prompt": "Hi", "temperature": ' + text + b"}")
    assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": ["x" * 1025]}, "stop.0"),
        ({"stop": 7}, "stop"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"model": "m" * 513}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"guided_json": {}}, "guided_json"),
        ({"user": "u" * 513}, "user"),
        ({"safety_identifier": 7}, "safety_identifier"),
    ],
)
def test_refusals_of_completions(fields: dict[str, Any], param: str) -> None:
    assert refused(CompletionBody, {"prompt": "Hi", **fields}).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {}}, "audio"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_refusals_of_chat(fields: dict[str, Any], param: str) -> None:
    assert refused(ChatBody, {"messages": MESSAGES, **fields}).param == param


def test_what_clients_send_and_what_changes_nothing_is_taken() -> None:
    """Nulls, the off values of features that are not here, and OpenAI's bookkeeping."""
    nulls = dict.fromkeys(("stop", "n", "temperature", "audio", "stream_options", "reasoning_effort"))
    off = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    bookkeeping = {"metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert chat(**nulls, **off, **bookkeeping) == chat()
    assert completion(best_of=1, suffix="", use_beam_search=False) == completion(best_of=1)


def test_an_unknown_key_gets_the_nearest_known_one() -> None:
    assert "did you mean 'max_tokens'?" in refused(CompletionBody, {"prompt": "x", "max_token": 1}).message
    assert "did you mean 'temperature'?" in refused(ChatBody, {"messages": MESSAGES, "temprature": 1}).message
    assert "leave it out" in refused(CompletionBody, {"prompt": "x", "zzz": 1}).message


@pytest.mark.parametrize(
    ("model", "content", "param"),
    [
        (CompletionBody, {"prompt": ["a"] * 5000}, "prompt"),
        (CompletionBody, {"prompt": [[1]] * 5000}, "prompt"),
        (CompletionBody, {"prompt": "x", "logit_bias": {str(token): "a" for token in range(5000)}}, "logit_bias"),
        (ChatBody, {"messages": ["a"] * 5000}, "messages"),
        (DetokenizeBody, {"tokens": ["a"] * 5000}, "tokens.0"),
    ],
)
def test_many_wrong_items_cost_no_more_than_one(model: type[Body], content: dict[str, Any], param: str) -> None:
    """Otherwise a body of the largest size occupies the process for seconds with its own errors."""
    with pytest.raises((InvalidRequest, ValidationError)) as caught:
        model.model_validate(content)
    assert not isinstance(caught.value, ValidationError) or caught.value.error_count() == 1
    assert refused(model, content).param == param


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_the_four_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], ["a", [1]], [True], [1.5], {}, 7, [None], [[1], 2], [[["a"]]]])
def test_other_forms_are_refused(prompt: object) -> None:
    assert refused(CompletionBody, {"prompt": prompt}).param == "prompt"


def test_a_prompt_is_needed() -> None:
    assert "prompt" in refused(CompletionBody, {}).message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'"x"', b"\xff", b'{"a":' * 5000, b'{"prompt": "\\ud800"}']
)
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="body"):
        parse_body(CompletionBody, content)


def test_parts_of_text_become_one() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse_body(ChatBody, json.dumps({"messages": [{"role": "developer", "content": parts}]}).encode())
    assert body.messages[0].for_template() == {"role": "system", "content": "a\nb"}


def test_a_message_may_be_sent_back_as_it_came() -> None:
    gone = dict.fromkeys(("refusal", "tool_calls", "audio"))
    came: dict[str, Any] = {"role": "assistant", "content": "x", "annotations": [], **gone}
    assert chat(messages=[came]).messages[0].for_template() == {"role": "assistant", "content": "x"}


def test_sampling_as_the_engine_takes_it() -> None:
    fields = {"temperature": 1e-6, "top_p": 0, "top_k": -1, "seed": -1, "logit_bias": {"7": 5}, "stop_token_ids": [99]}
    sampling = completion(**fields).sampling(8, VOCAB_SIZE, logprobs=2)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.0, 0, 2**63 - 1)
    assert 0 < sampling.top_p < 1e-6
    assert (sampling.logit_bias, sampling.stop_token_ids, sampling.logprobs) == ({7: 5.0}, (99,), 2)


def test_a_missing_seed_is_drawn_once_for_the_request() -> None:
    seeds = {completion().sampling(8, VOCAB_SIZE, None).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"min_tokens": 9}, "min_tokens"),
    ],
)
def test_what_only_the_model_can_refuse(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(**fields).sampling(8, VOCAB_SIZE, None)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"echo": True}, None),
        ({"logprobs": 2}, None),
        ({"echo": True, "logprobs": 2}, 2),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 3, "echo": True, "logprobs": 2}, 3),
    ],
)
def test_the_prompts_logprobs_are_computed_only_when_asked_for(fields: dict[str, Any], expected: int | None) -> None:
    assert completion(**fields).wanted_prompt_logprobs() == expected


def test_tokenize_takes_a_prompt_or_messages() -> None:
    assert parse_body(TokenizeBody, b'{"prompt": ""}').prompt == ""
    for content in ({}, {"prompt": "x", "messages": MESSAGES}):
        refused(TokenizeBody, content)
    assert refused(DetokenizeBody, {"tokens": "x"}).param == "tokens"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(content=st.dictionaries(st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields]), JSON))
def test_any_json_is_a_request_or_refused_as_one(content: dict[str, Any]) -> None:
    for model in (CompletionBody, ChatBody):
        with contextlib.suppress(InvalidRequest):
            parse_body(model, json.dumps(content).encode())
