"""What is learned from, as blocks: text files, and the teacher's own text; with parts that are only measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from consilium.default_model.gguf_file import GgufFile
from consilium.default_model.tokenizer import read_tokenizer
from consilium.errors import ConfigError
from training.blocks import Tokens, cut_blocks, is_held_out, is_repetitive, join_documents
from training.generate import Sampler, lay_segments
from training.llama import Dense
from training.prompts import draw_prompts
from training.recipe import GeneratedRecipe, Recipe

# Tokens that begin a message, end one, or are no text, by the names that ChatML and GPT-2's vocabulary give them.
START, ENDS = "<|im_start|>", ("<|im_end|>", "<|endoftext|>")
_PROMPTS_PER_ROW, _LONGEST_PROMPT = 10, 64


@dataclass(frozen=True, slots=True)
class Corpora:
    """Blocks [N, L] to learn from, and those of each corpus that are only measured."""

    train: Tensor
    held_out: dict[str, Tensor]


def read_corpora(recipe: Recipe, device: torch.device, generated: Tokens | None = None) -> Corpora:
    """Every text cut to blocks, and ``generated`` rows beside them.

    Raises ConfigError for a file that is missing or a corpus that is too small.
    """
    tokenizer = tokenizer_of(recipe.teacher)
    separator = tokenizer.token_to_id(recipe.separator)
    if separator is None:
        raise ConfigError(f"separator: the teacher's tokenizer has no token {recipe.separator!r}")

    def blocks(documents: list[str], place: str) -> Tensor:
        encoded = (tokenizer.encode(each, add_special_tokens=False).ids for each in documents)
        cut = cut_blocks(join_documents(encoded, separator), recipe.block_length, place)
        return torch.from_numpy(cut.astype(np.int32)).to(device)

    train, held_out = [], {}
    for name, file in recipe.text.items():
        documents = _documents(f"text.{name}", file)
        kept = [is_held_out(each, recipe.held_out) for each in documents]
        learned = [each for each, held in zip(documents, kept, strict=True) if not held]
        train.append(blocks(learned, f"text.{name}, to learn from:"))
        held_out[name] = blocks(
            [each for each, held in zip(documents, kept, strict=True) if held], f"text.{name}, held out:"
        )
    for name, file in recipe.measured_text.items():
        held_out[name] = blocks(_documents(f"measured_text.{name}", file), f"measured_text.{name}:")
    if generated is not None:
        last = len(generated) - max(1, round(recipe.held_out * len(generated)))
        parts = (generated[:last], generated[last:])
        cut = [cut_blocks(part.reshape(-1), recipe.block_length, "generated:").astype(np.int32) for part in parts]
        train.append(torch.from_numpy(cut[0]).to(device))
        held_out["generated"] = torch.from_numpy(cut[1]).to(device)
    return Corpora(torch.cat(train), held_out)


def read_documents(file: Path) -> list[str]:
    """The documents of a file: a JSON object with `text` a line in .jsonl, else parts between blank lines.

    Raises OSError, and ConfigError for lines of .jsonl that are something else.
    """
    content = file.read_text("utf-8")
    if file.suffix != ".jsonl":
        return [part for part in content.split("\n\n") if part.strip()]
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            documents.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'{file}, line {number}: must be an object {{"text": "…"}}, found {line:.40}') from None
    return documents


def tokenizer_of(teacher: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file."""
    if teacher.is_dir():
        return Tokenizer.from_file(str(teacher / "tokenizer.json"))
    return read_tokenizer(GgufFile(teacher))


def generate(how: GeneratedRecipe, teacher: Dense, tokenizer: Tokenizer) -> Tokens:
    """Rows [R, L] that the teacher writes about the topics in ``how.topics``; rows caught in a loop are left out.

    Raises ConfigError where the tokenizer knows no ChatML, topics are missing, or all rows are loops.
    """
    ends = [id_ for id_ in map(tokenizer.token_to_id, ENDS) if id_ is not None]
    if len(ends) < len(ENDS) or tokenizer.token_to_id(START) is None:
        raise ConfigError(f"generated: the teacher's tokenizer lacks one of {START}, {', '.join(ENDS)}; leave it out")
    try:
        topics = [line for line in how.topics.read_text("utf-8").splitlines() if line]
    except OSError as error:
        raise ConfigError(f"generated.topics: cannot read {how.topics}: {error.strerror}") from None
    if len(topics) < 2:
        raise ConfigError(f"generated.topics: {how.topics} must have two topics or more, one a line")
    special = [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    sampler = Sampler(teacher, how.rows, how.length, ends, [id_ for id_ in special if id_ not in ends])
    prompts = _prompts(tokenizer, topics, how.seed, first=ends[-1])
    torch.manual_seed(how.seed)
    found = []
    for number in range(how.rounds):
        segments = lay_segments(prompts, how.rows, _PROMPTS_PER_ROW, min(_LONGEST_PROMPT, how.length // 2))
        heat = np.random.default_rng((how.seed, number)).choice(how.temperatures, how.rows).astype(np.float32)
        rows = sampler.sample(segments, heat)
        found += [row for row in rows if not is_repetitive(row.tolist())]
    if len(found) < 2:
        raise ConfigError("generated: the teacher's rows are loops, all but one; raise the temperatures")
    return np.stack(found)


def _prompts(tokenizer: Tokenizer, topics: list[str], seed: int, first: int) -> Iterator[list[int]]:
    """As tokens, with ``first`` in front; where the user's question is the teacher's to write, then its answer."""
    answer = tokenizer.encode(f"\n{START}assistant\n").ids
    for prompt in draw_prompts(topics, seed):
        yield [first, *tokenizer.encode(prompt).ids]
        if prompt.endswith("user\n"):
            yield answer


def _documents(place: str, file: Path) -> list[str]:
    try:
        return read_documents(file)
    except OSError as error:
        raise ConfigError(f"{place}: cannot read {file}: {error.strerror}") from None
