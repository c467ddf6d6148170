"""Real text with clean licences, from three published packages: Python's documentation (PSF-2.0), WordNet's glosses
(WordNet licence) and conversations (MIT). Each corpus is an iterator of documents, always in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# (corpus, how its package is fetched, where its text lies in the package)
PACKAGES = {
    "docs": ("apt-get download python3.11-doc=3.11.2-6+deb12u9", "usr/share/doc/python3.11/html/_sources"),
    "glosses": ("apt-get download wordnet-base=1:3.0-37", "usr/share/wordnet"),
    "chat": ("pip download --no-deps chitchat-dataset==0.9.0", "chitchat_dataset/dataset.json"),
}
GLOSSES_PER_DOCUMENT = 16
_KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
# A document shorter than this says too little to learn from.
_FEWEST_CHARACTERS = 200


def docs(folder: Path, kept_out: str = "") -> Iterator[str]:
    """The pages of Python's documentation as reStructuredText, without paragraphs that ``kept_out`` has, too."""
    known = set(_runs(kept_out))
    for file in sorted(folder.rglob("*.rst.txt")):
        parts = file.read_text("utf-8").split("\n\n")
        page = "\n\n".join(part for part in parts if not _overlaps(part, known))
        if len(page) >= _FEWEST_CHARACTERS:
            yield page


def glosses(folder: Path) -> Iterator[str]:
    """WordNet's words with what they mean, some to a document, in the order of a hash: neighbours are no synonyms."""
    lines = sorted(_gloss_lines(folder), key=_shuffling)
    for start in range(0, len(lines), GLOSSES_PER_DOCUMENT):
        yield "\n".join(lines[start : start + GLOSSES_PER_DOCUMENT])


def chat(file: Path) -> Iterator[str]:
    """Conversations as transcripts: A and B in turns. Not as ChatML: their answers are people's, not an assistant's."""
    for conversation in json.loads(file.read_text("utf-8")).values():
        turns = []
        for number, messages in enumerate(conversation["messages"]):
            said = " ".join(message["text"].strip() for message in messages)
            turns.append(f"{'AB'[number % 2]}: {said}")
        transcript = "\n".join(turns)
        if len(transcript) >= _FEWEST_CHARACTERS:
            yield transcript


def nouns(folder: Path, fewest_uses: int = 2) -> list[str]:
    """WordNet's nouns that its tagged texts use, sorted: topics for prompts."""
    used = set()
    for line in (folder / "cntlist.rev").read_text("ascii").splitlines():
        key, _, count = line.split()
        word, _, sense = key.partition("%")
        if sense.startswith("1:") and int(count) >= fewest_uses and word.replace("_", "").isalpha():
            used.add(word.replace("_", " "))
    return sorted(used)


def _gloss_lines(folder: Path) -> Iterable[str]:
    for part, kind in _KINDS.items():
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry, _, gloss = line.partition(" | ")
            word = re.sub(r"\(.*\)$", "", entry.split()[4]).replace("_", " ")
            yield f"{word} ({kind}): {gloss.strip()}"


def _runs(text: str) -> list[tuple[str, ...]]:
    """Every six words in a row, without markup: a page's source says :ref:`name` where the page says name."""
    words = re.findall(r"[a-z]+", re.sub(r":[a-z:]+:`", "`", text.lower()))
    return [tuple(words[start : start + 6]) for start in range(len(words) - 5)]


def _overlaps(text: str, known: set[tuple[str, ...]]) -> bool:
    runs = _runs(text)
    return sum(run in known for run in runs) > 0.2 * len(runs)


def _shuffling(line: str) -> int:
    """An order that depends on each line alone, the same on every machine (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in line.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value
