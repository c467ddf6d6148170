"""bench.streams: who came when is read from the bytes, however they are cut, and nothing but whole streams counts."""

from __future__ import annotations

import pytest

from bench.streams import between_tokens, token_times

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENTS = [b'data: {"choices":[{"index":%d,"text":"a"}]}\n\n' % index for index in (0, 1, 0, 1)]
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("size", [1, 5, 37, 10_000])
def test_every_event_has_the_time_of_its_last_byte(size: int) -> None:
    whole = HEAD + b"".join(EVENTS) + DONE
    ends = [len(HEAD) + sum(map(len, EVENTS[: count + 1])) for count in range(4)]
    reads = [
        (float(min(start + size, len(whole))), whole[start : start + size]) for start in range(0, len(whole), size)
    ]
    times = token_times(reads)
    expected = [next(at for at, _ in reads if at >= end) for end in ends]
    assert times == {0: [expected[0], expected[2]], 1: [expected[1], expected[3]]}


@pytest.mark.parametrize(
    ("reply", "error"),
    [(HEAD + EVENTS[0], "broke off"), (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", "429"), (b"", "broke off")],
)
def test_half_an_answer_is_none(reply: bytes, error: str) -> None:
    with pytest.raises(RuntimeError, match=error):
        token_times([(0.0, reply)])


def test_only_what_all_streams_share_counts() -> None:
    assert between_tokens([[0, 1, 2, 4, 6], [2, 4, 7, 8]]) == [2, 2, 2]
    with pytest.raises(RuntimeError, match="same time"):
        between_tokens([[0, 1], [2, 3]])
