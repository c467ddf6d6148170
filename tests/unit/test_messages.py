"""The messages between the HTTP process and the engine read back as they were sent; anything else is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway import messages
from gateway.messages import (
    LENGTH_BYTES,
    Abort,
    CacheStats,
    ExpertLoad,
    Generate,
    Status,
    Step,
    ToEngine,
    ToHttp,
    pack,
    unpack,
)

# NaN equals nothing, itself included; infinities must pass, since a token may be impossible.
st.register_type_strategy(float, st.floats(allow_nan=False))
for kind in vars(messages).values():
    if isinstance(kind, type) and is_dataclass(kind):
        st.register_type_strategy(kind, st.builds(kind, **{field.name: ... for field in fields(kind)}))

MESSAGES = st.one_of(*(st.from_type(kind) for kind in (Generate, Abort, Step, Status, ExpertLoad, CacheStats)))


@given(MESSAGES)
def test_round_trip(message: ToEngine | ToHttp) -> None:
    packed = pack(message)
    assert int.from_bytes(packed[:LENGTH_BYTES], "little") == len(packed) - LENGTH_BYTES
    assert unpack(packed[LENGTH_BYTES:]) == message


def test_an_impossible_token_has_a_log_probability() -> None:
    logprobs = messages.TokenLogprobs(3, -math.inf, [1], [-0.0])
    step = Step([messages.Output(1, 3, logprobs)], messages.EngineStats(1, 0, 4, 8))
    assert unpack(pack(step)[LENGTH_BYTES:]) == step


@pytest.mark.parametrize(
    "body",
    [
        {"type": "generate"},
        {"type": "nothing known", "id": 1},
        {"id": 1},
        {"type": "abort", "id": "x"},
        {"type": "abort", "id": 1, "more": 2},
        [],
        None,
    ],
)
def test_other_objects_are_refused(body: object) -> None:
    with pytest.raises(ValidationError):
        unpack(json.dumps(body).encode())


@given(st.binary(max_size=60))
def test_other_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ValidationError):
        unpack(body)
