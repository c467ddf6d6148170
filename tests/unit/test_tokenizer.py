"""What tokenizer.json and tokenizer_config.json say together."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from consilium.errors import CheckpointError
from gateway.tokenizer import Tokenizer
from tests.tiny_tokenizer import BOS, save_tokenizer

BOS_ID = 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path, 384)
    return tmp_path


def adds_bos(folder: Path) -> None:
    """As Llama's and Mixtral's tokenizer.json: the post-processor puts BOS first."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    library.save(str(folder / "tokenizer.json"))


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    stated = {**json.loads(file.read_text("utf-8")), **settings}
    file.write_text(json.dumps({key: value for key, value in stated.items() if value != "absent"}), "utf-8")


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    return asyncio.run(tokenizer.encode([text], add_special_tokens))[0]


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize(("stated", "expected"), [(True, True), (False, False), ("absent", None)])
def test_bos_as_tokenizer_config_says_else_as_tokenizer_json_says(
    folder: Path, in_file: bool, stated: object, expected: bool | None
) -> None:
    if in_file:
        adds_bos(folder)
    configure(folder, add_bos_token=stated)
    tokenizer = Tokenizer(folder, 384)
    plain = encode(tokenizer, "Hello there", add_special_tokens=False)
    wanted = in_file if expected is None else expected
    assert encode(tokenizer, "Hello there") == ([BOS_ID, *plain] if wanted else plain)
    assert BOS_ID not in plain


def test_a_bos_that_the_client_wrote_stays(folder: Path) -> None:
    configure(folder, add_bos_token=False)
    tokenizer = Tokenizer(folder, 384)
    assert encode(tokenizer, BOS + "Hello") == [BOS_ID, *encode(tokenizer, "Hello")]


def test_special_tokens_are_written_in_two_ways(folder: Path) -> None:
    configure(folder, eos_token={"content": "</s>", "lstrip": False}, pad_token=None)
    tokenizer = Tokenizer(folder, 384)
    assert (tokenizer.special_token("bos_token"), tokenizer.special_token("eos_token")) == ("<s>", "</s>")
    assert tokenizer.special_token("pad_token") is None


def test_long_texts_are_encoded_alike_on_another_thread(folder: Path) -> None:
    tokenizer = Tokenizer(folder, 384)
    library = Library.from_file(str(folder / "tokenizer.json"))
    text = "the experts meet; " * 1000
    assert encode(tokenizer, text) == library.encode(text).ids
    assert 0 < tokenizer.fewest_tokens(text) <= len(library.encode(text).ids)


def test_truncation_and_padding_of_the_file_are_not_applied(folder: Path) -> None:
    library = Library.from_file(str(folder / "tokenizer.json"))
    plain = library.encode("one two three").ids
    library.enable_truncation(2)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    assert encode(Tokenizer(folder, 384), "one two three") == plain


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ids up to 383.*vocab_size is 300"):
        Tokenizer(folder, 300)


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"model": {"type": "Unheard"}}'])
def test_a_damaged_tokenizer_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(folder, 384)


def test_a_missing_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, 384)
