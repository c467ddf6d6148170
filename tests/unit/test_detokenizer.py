"""Text one token at a time is the text of all tokens at once, and stop strings do not care about token borders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Metaspace, Replace, Strip
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE

from consilium.errors import CheckpointError
from gateway.detokenizer import Detokenizer, StopStrings, decode_prompt
from gateway.vocabulary import Vocabulary
from tests.tiny_tokenizer import save_tokenizer

BYTES = range(4, 260)  # ids of the tiny tokenizer's single bytes


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 384)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def vocabulary(byte_level: Tokenizer) -> Vocabulary:
    return Vocabulary(byte_level, {"type": "ByteLevel"})


def push_all(vocabulary: Vocabulary, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(vocabulary, prompt=prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@given(text=st.text())
def test_any_text_comes_back_whole(byte_level: Tokenizer, vocabulary: Vocabulary, text: str) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False).ids
    assert "".join(push_all(vocabulary, tokens)) == byte_level.decode(tokens)


@given(text=st.text(), data=st.data())
def test_any_split_of_characters_into_bytes_comes_back_whole(
    vocabulary: Vocabulary, text: str, data: st.DataObject
) -> None:
    """One token per byte is the worst split there is; no piece ever shows half a character."""
    id_of = {vocabulary.token_bytes(token): token for token in BYTES}
    tokens = [id_of[bytes([byte])] for byte in text.encode()]
    at = data.draw(st.integers(0, len(tokens)))
    pieces = push_all(vocabulary, tokens)
    assert "".join(pieces) == text
    assert "".join(pieces[:at]) == text.encode()[:at].decode(errors="ignore")


@given(tokens=st.lists(st.integers(0, 390)))
def test_tokens_in_any_order_decode_as_the_library_decodes_them(
    byte_level: Tokenizer, vocabulary: Vocabulary, tokens: list[int]
) -> None:
    """Also bytes that are no UTF-8, special tokens, and ids that only the padded model knows."""
    assert "".join(push_all(vocabulary, tokens)) == byte_level.decode(tokens)
    assert vocabulary.decode(tokens, skip_special_tokens=False) == byte_level.decode(tokens, skip_special_tokens=False)


@given(text=st.text(), at=st.integers(0, 100))
def test_a_prompt_that_ends_within_a_character_is_completed(vocabulary: Vocabulary, text: str, at: int) -> None:
    id_of = {vocabulary.token_bytes(token): token for token in BYTES}
    tokens = [id_of[bytes([byte])] for byte in text.encode()]
    prompt, rest = tokens[:at], tokens[at:]
    shown, offsets = decode_prompt(vocabulary, prompt)
    assert shown + "".join(push_all(vocabulary, rest, prompt)) == text
    assert offsets == [len(text.encode()[:position].decode(errors="ignore")) for position in range(len(prompt))]


def test_the_end_within_a_character_is_marked(vocabulary: Vocabulary) -> None:
    half = next(token for token in BYTES if vocabulary.token_bytes(token) == "日".encode()[:1])
    assert push_all(vocabulary, [half]) == ["", "\ufffd"]
    assert vocabulary.token_text(half) == "bytes:\\xe6"


def sentence_piece() -> Tokenizer:
    """SentencePiece's ways: ▁ for a space, bytes as <0xNN>, the first space of a text not shown."""
    tokens = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "lo", "é"]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.decoder = DecoderSequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return tokenizer


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


SENTENCE_PIECE = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


@pytest.mark.parametrize(
    "tokens",
    [
        ["<s>", "▁Hello", "▁world", "é"],
        ["▁", "▁Hello"],
        ["lo", "▁", "▁world"],
        ["▁Hello", "<0xE6>", "<0x97>", "<0xA5>", "lo"],
    ],
)
def test_sentence_piece_decodes_as_the_library_decodes_it(tokens: list[str]) -> None:
    tokenizer = sentence_piece()
    ids = ids_of(tokenizer, *tokens)
    assert Vocabulary(tokenizer, SENTENCE_PIECE).decode(ids) == tokenizer.decode(ids)


def test_a_continuation_keeps_its_first_space() -> None:
    tokenizer = sentence_piece()
    vocabulary = Vocabulary(tokenizer, SENTENCE_PIECE)
    hello, world = ids_of(tokenizer, "▁Hello", "▁world")
    assert decode_prompt(vocabulary, [hello, hello]) == ("Hello Hello", [0, 5])
    assert "".join(push_all(vocabulary, [world], [hello])) == " world"


def test_metaspace_is_known() -> None:
    tokenizer = sentence_piece()
    tokenizer.decoder = Metaspace()
    vocabulary = Vocabulary(tokenizer, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})
    ids = ids_of(tokenizer, "▁Hello", "▁world")
    assert vocabulary.decode(ids) == tokenizer.decode(ids) == "Hello world"


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "CTC"}]}])
def test_an_unknown_decoder_is_refused(byte_level: Tokenizer, decoder: dict[str, object] | None) -> None:
    with pytest.raises(CheckpointError, match="supported"):
        Vocabulary(byte_level, decoder)


def cut(stops: list[str], pieces: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include)
    text = "".join([*map(matcher.push, pieces), matcher.finish()])
    return text, matcher.matched


@pytest.mark.parametrize("text", ["one two STOP three", "STOP", "aaSTSTOPx", "no end ST", "SSSTOPP"])
def test_a_stop_string_is_found_wherever_the_text_is_split(text: str) -> None:
    before, stop, _ = text.partition("STOP")
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = [text[:first], text[first:second], text[second:]]
            assert cut(["STOP"], pieces) == (before, stop or None)
            assert cut(["STOP"], pieces, include=True) == (before + stop, stop or None)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    split=st.lists(st.integers(0, 30), max_size=5),
)
def test_the_stop_string_that_ends_first_wins(text: str, stops: list[str], split: list[int]) -> None:
    borders = sorted({0, len(text), *(at for at in split if at < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert cut(stops, pieces) == (text, None)
        return
    longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
    assert cut(stops, pieces) == (text[: ends[0] - len(longest)], longest)


@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=4))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: str) -> None:
    matcher = StopStrings([stop])
    sent = ""
    for position, character in enumerate(text, start=1):
        sent += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(sent) : position]
        assert stop.startswith(held)
        assert len(held) < len(stop)
        assert not any(stop.startswith(text[start:position]) for start in range(len(sent)))


def test_nothing_follows_a_stop_string() -> None:
    matcher = StopStrings(["b"])
    assert [matcher.push("abc"), matcher.push("abc"), matcher.finish()] == ["a", "", ""]
