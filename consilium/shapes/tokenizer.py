"""A tokenizer of any size, without training: byte-level BPE that knows all words of a to z, short ones first.

Every text has tokens and every token has a text, so that prompts and answers look the part. Free of torch.
"""

from __future__ import annotations

import string
from collections import deque
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the first ids
SPACE = "Ġ"  # how byte-level BPE writes it
SMALLEST = len(SPECIAL_TOKENS) + 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_json(vocab_size: int) -> str:
    """The tokenizer.json with exactly the ids 0 to ``vocab_size`` - 1 (at least SMALLEST)."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    stems = deque((SPACE, *string.ascii_lowercase))
    while len(tokens) < vocab_size:
        stem = stems.popleft()
        for letter in string.ascii_lowercase[: vocab_size - len(tokens)]:
            merges.append((stem, letter))
            tokens.append(stem + letter)
            stems.append(stem + letter)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer.to_str()


def tokenizer_config() -> dict[str, Any]:
    """The tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
