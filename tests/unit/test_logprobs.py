"""Log-probabilities as clients of the two APIs read them."""

from __future__ import annotations

import json
import math

import pytest

from gateway.logprobs import Entry, LogprobsFormat
from gateway.messages import TokenLogprobs
from gateway.tokenizer import Tokenizer
from gateway.vocabulary import Vocabulary
from tests.fake_engine import spell
from tests.tiny_tokenizer import save_tokenizer

A, B, C = spell("abc")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 384)
    return Tokenizer(folder, 384).vocabulary


@pytest.fixture(scope="module")
def half(vocabulary: Vocabulary) -> int:
    """A token that is half a character."""
    return next(token for token in range(4, 260) if vocabulary.token_bytes(token) == b"\xe6")


def unlikely(token: int = C) -> TokenLogprobs:
    return TokenLogprobs(token, -5.0, [A, B], [-0.5, -1.5])


def test_completions_show_the_chosen_token_last_when_it_is_not_among_the_likeliest(vocabulary: Vocabulary) -> None:
    entries = [Entry(A, None, 0), Entry(C, unlikely(), 1), Entry(A, TokenLogprobs(A, -0.5, [A, B], [-0.5, -1.5]), 2)]
    assert LogprobsFormat(vocabulary, 2).completion(entries) == {
        "tokens": ["a", "c", "a"],
        "token_logprobs": [None, -5.0, -0.5],
        "top_logprobs": [None, {"a": -0.5, "b": -1.5, "c": -5.0}, {"a": -0.5, "b": -1.5}],
        "text_offset": [0, 1, 2],
    }


@pytest.mark.parametrize(("alternatives", "names"), [(0, ["c"]), (1, ["a", "c"]), (2, ["a", "b", "c"])])
def test_no_more_alternatives_than_were_asked_for(vocabulary: Vocabulary, alternatives: int, names: list[str]) -> None:
    shown = LogprobsFormat(vocabulary, alternatives).completion([Entry(C, unlikely(), 0)])
    assert list(shown["top_logprobs"][0]) == names


def test_of_two_tokens_with_one_text_the_likelier_keeps_the_name(vocabulary: Vocabulary) -> None:
    padding = 400, 401  # ids without any text
    token = TokenLogprobs(padding[1], -2.0, [padding[0], padding[1]], [-1.0, -2.0])
    by_text = LogprobsFormat(vocabulary, 2).completion([Entry(padding[1], token, 0)])
    by_id = LogprobsFormat(vocabulary, 2, as_token_ids=True).completion([Entry(padding[1], token, 0)])
    assert by_text["top_logprobs"] == [{"": -1.0}]
    assert by_id["top_logprobs"] == [{"token_id:400": -1.0, "token_id:401": -2.0}]
    assert by_id["tokens"] == ["token_id:401"]


def test_chat_has_bytes_and_only_what_was_asked_for(vocabulary: Vocabulary, half: int) -> None:
    entry = Entry(half, unlikely(half), 0)
    assert LogprobsFormat(vocabulary, 1).chat([entry]) == {
        "content": [
            {
                "token": "bytes:\\xe6",
                "logprob": -5.0,
                "bytes": [0xE6],
                "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
            }
        ]
    }


def test_prompt_logprobs_by_id(vocabulary: Vocabulary) -> None:
    first, second = LogprobsFormat(vocabulary, 1).prompt([unlikely()])
    assert first is None
    assert second == {
        str(A): {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        str(C): {"logprob": -5.0, "rank": None, "decoded_token": "c"},
    }


def test_what_cannot_be_is_still_json(vocabulary: Vocabulary) -> None:
    token = TokenLogprobs(A, -math.inf, [B, A], [0.0, -math.inf])
    form = LogprobsFormat(vocabulary, 2)
    shown = [form.completion([Entry(A, token, 0)]), form.chat([Entry(A, token, 0)]), form.prompt([token])]
    assert "-9999" in json.dumps(shown, allow_nan=False)
