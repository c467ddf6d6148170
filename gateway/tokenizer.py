"""The model's tokenizer, as tokenizer.json and tokenizer_config.json state it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from consilium.errors import CheckpointError
from consilium.model_folder import read_json
from consilium.shapes.folder import ShapeFolder
from consilium.tokenizer_file import load_tokenizer
from gateway.vocabulary import Vocabulary

# Longer texts are encoded on another thread, with the interpreter's lock released (1 MB takes about half a second).
_INLINE_CHARACTERS = 4096


class Tokenizer:
    """Text to ids and back.

    Raises CheckpointError where the folder has no tokenizer.json, or one that does not fit the model's vocabulary.
    """

    def __init__(self, folder: Path | ShapeFolder, vocab_size: int) -> None:
        self.settings = read_json(folder / "tokenizer_config.json") if _has(folder, "tokenizer_config.json") else {}
        self._fast, stated = _load(folder)
        largest = max(self._fast.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= vocab_size:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} has token ids up to {largest}, but the model's vocab_size is "
                f"{vocab_size}; this tokenizer belongs to another model"
            )
        self.vocab_size = vocab_size
        self.vocabulary = Vocabulary(self._fast, stated.get("decoder"))
        self._bos_missing, self._bos_unwanted = self._compare_bos()
        self._longest_token = max(map(len, self._fast.get_vocab(with_added_tokens=True)), default=1)

    def special_token(self, name: str) -> str | None:
        """The text of ``bos_token``, ``eos_token``, … in tokenizer_config.json, which has two ways to write it."""
        value = self.settings.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) else None

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of ``text``, without encoding it; normalization may shrink it up to fourfold."""
        return len(text) // (4 * self._longest_token)

    async def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text; special tokens written in a text are recognized."""
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return self._encode(texts, add_special_tokens)
        return await asyncio.to_thread(self._encode, texts, add_special_tokens)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # A batch of one, because only the batch call releases the interpreter's lock.
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        return [self._with_bos(each) for each in ids] if add_special_tokens else ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos_unwanted:
            return ids[1:]
        return ids if self._bos_missing is None else [self._bos_missing, *ids]

    def _compare_bos(self) -> tuple[int | None, bool]:
        """The BOS id that tokenizer.json fails to add, and whether it adds one against `add_bos_token`.

        tokenizer_config.json has the last word where it says anything, as in transformers.
        """
        text, wanted = self.special_token("bos_token"), self.settings.get("add_bos_token")
        bos = None if text is None else self._fast.token_to_id(text)
        if bos is None or not isinstance(wanted, bool):
            return None, False
        added = self._fast.encode("").ids[:1] == [bos]
        return (bos if wanted and not added else None), added and not wanted


def _has(folder: Path | ShapeFolder, name: str) -> bool:
    return (folder / name).is_file()


def _load(folder: Path | ShapeFolder) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    file = folder / "tokenizer.json"
    stated = read_json(file)
    tokenizer = load_tokenizer(file)
    return tokenizer, stated
