"""Text from tokens, one at a time: never half a character, and never a stop string or the beginning of one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gateway.vocabulary import Vocabulary

_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8


class Detokenizer:
    """Turns a stream of tokens into a stream of text, O(1) per token.

    ``prompt`` is what the tokens follow: where it ends within a character, the first tokens complete that character.
    """

    __slots__ = ("_decoder", "_skipped", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in prompt[-_LONGEST_CHARACTER:]:
            self.push(token)

    def push(self, token: int) -> str:
        """The characters that ``token`` completes."""
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._vocabulary.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD where the tokens ended within a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def decode_prompt(
    vocabulary: Vocabulary, tokens: Sequence[int], skip_special_tokens: bool = True
) -> tuple[str, list[int]]:
    """The text of a prompt, and where in it, in characters, each token begins.

    A character that the prompt leaves unfinished is not in the text: the tokens that follow complete it.
    """
    detokenizer = Detokenizer(vocabulary, skip_special_tokens)
    pieces, offsets, length = [], [], 0
    for token in tokens:
        offsets.append(length)
        pieces.append(detokenizer.push(token))
        length += len(pieces[-1])
    text = "".join(pieces)
    kept = vocabulary.strip_start(text)
    stripped = length - len(kept)
    return kept, [max(0, offset - stripped) for offset in offsets]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends the text at the first complete one.

    Every stop string is followed with its own Knuth-Morris-Pratt automaton, so where the tokens' borders lie makes no
    difference and a character costs O(number of stop strings), amortized. The stop string that ends first counts, of
    several ending at once the longest.
    """

    __slots__ = ("_failures", "_held", "_include", "_matched_lengths", "_stops", "matched")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._matched_lengths = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be sent now; nothing more once ``matched`` is set."""
        if not self._stops or self.matched is not None:
            return "" if self._stops else text
        for position, character in enumerate(text, start=1):
            complete = self._advance(character)
            if complete is not None:
                self.matched = complete
                found, self._held = self._held + text[:position], ""
                return found if self._include else found[: -len(complete)]
        unsent = self._held + text
        safe = len(unsent) - max(self._matched_lengths)
        self._held = unsent[safe:]
        return unsent[:safe]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        complete: str | None = None
        for index, stop in enumerate(self._stops):
            length, failure = self._matched_lengths[index], self._failures[index]
            while length and stop[length] != character:
                length = failure[length - 1]
            length += stop[length] == character
            self._matched_lengths[index] = length
            if length == len(stop) and len(stop) > len(complete or ""):
                complete = stop
        return complete


def _failure_function(pattern: str) -> list[int]:
    """For every prefix of ``pattern``, the length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(pattern)
    length = 0
    for position in range(1, len(pattern)):
        while length and pattern[position] != pattern[length]:
            length = failure[length - 1]
        length += pattern[position] == pattern[length]
        failure[position] = length
    return failure
