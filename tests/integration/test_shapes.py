"""A model without files, served by processes that each make their own part of it; and the same from a folder."""

from __future__ import annotations

from pathlib import Path

import httpx

from consilium.shapes.folder import parse_shape
from consilium.shapes.write import write_shape
from tests.integration.completions import DEADLINE_SECONDS, complete
from tests.stack import stack

PROMPT = list(range(300, 330))


def test_a_shape_answers_and_its_written_copy_answers_alike(tmp_path: Path) -> None:
    shape = parse_shape("shape:tiny,seed=5")
    write_shape(shape, tmp_path / "tiny")
    with stack(shape, workers=2, quantization="int8") as served:
        expected = complete(served.url, PROMPT, 24)
        body = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=DEADLINE_SECONDS).json()
        models = httpx.get(f"{served.url}/v1/models", timeout=DEADLINE_SECONDS).json()
    assert models["data"][0]["id"] == answer["model"] == "shape:tiny,seed=5"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["content"]
    assert (expected.error, len(expected.tokens)) == (None, 24)
    with stack(tmp_path / "tiny", workers=1, quantization="int8") as served:
        complete(served.url, PROMPT, 24).assert_same(expected)
