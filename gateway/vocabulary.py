"""What each token id stands for in bytes, so that text can be put together one token at a time.

A tokenizer's own ``decode`` wants all ids at once: it joins bytes of several tokens into one character and treats the
first token differently. Every decoder met in language models is, token by token, a mapping to bytes; the two kinds
are byte-level BPE (GPT-2: a character per byte) and SentencePiece with byte fallback (``<0xE6>``, ``▁`` for a space).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from consilium.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED = "ByteLevel, or a Sequence of Replace, ByteFallback, Fuse, Strip, Metaspace"


class Vocabulary:
    """Bytes and readable text of every token id.

    Raises CheckpointError where tokenizer.json has a decoder that is neither byte-level nor SentencePiece's.
    """

    def __init__(self, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, content in added.items() if content.special)
        self._byte_level = False
        self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self.leading_spaces = 0  # how many spaces are dropped where a text begins
        for step in _steps(decoder):
            self._add_step(step)

    def token_bytes(self, token: int) -> bytes:
        """What ``token`` adds to the text; nothing for an id that the tokenizer does not know."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._decode_token(token)
        return found

    def token_text(self, token: int) -> str:
        """The text of one token alone; part of a character is written as the old OpenAI API did: ``bytes:\\xe2``."""
        content = self.token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        content = b"".join(self.token_bytes(token) for token in tokens if token not in skipped)
        return self.strip_start(content.decode(errors="replace"))

    def strip_start(self, text: str) -> str:
        """``text`` less the spaces that the tokenizer itself puts where a text begins."""
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self.leading_spaces) :]

    def _decode_token(self, token: int) -> bytes:
        # A model's vocabulary may be padded beyond the tokenizer's; those ids have no text.
        text = self._tokenizer.id_to_token(token) or ""
        for old, new in self._replace:
            text = text.replace(old, new)
        if self._byte_level and all(character in _BYTE_OF for character in text):
            return bytes(_BYTE_OF[character] for character in text)
        byte = _BYTE_TOKEN.fullmatch(text) if self._byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else text.encode()

    def _add_step(self, step: Mapping[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass  # tokens are joined here anyway
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replace.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                self.leading_spaces = start
            case {"type": "Metaspace", "replacement": str(old)}:
                self._replace.append((old, " "))
                self.leading_spaces = int(step.get("prepend_scheme", "always") != "never")
            case _:
                raise CheckpointError(
                    f"tokenizer.json: the decoder {step.get('type')!r} is not supported as it stands there; "
                    f"supported: {_SUPPORTED}"
                )


def _steps(decoder: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if decoder is None:
        raise CheckpointError(f"tokenizer.json has no decoder; supported: {_SUPPORTED}")
    steps: Sequence[Mapping[str, Any]] = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return steps


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own Latin-1 character, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
