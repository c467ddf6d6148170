"""A small byte-level BPE tokenizer with a ChatML template, trained on the few lines below: no download."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

BOS, EOS, IM_START, IM_END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, IM_START, IM_END)  # ids 0, 1, 2, 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Repeated words become tokens of their own; the other scripts give tokens that split a character.
_CORPUS = (
    "the experts meet and the gate asks some of them what they think of the next token",
    "a consilium is the meeting of specialists over one case, and the case is the next word",
    "one expert reads, another expert writes; the gate weighs their answers and adds them up",
    "Hello there! How are you? What is the answer? The answer is 42, and 1 + 2 = 3.",
    "für Zoë: naïve café, smörgåsbord; Привет, мир; 日本語の文字 日本; emoji 🙂🙂 🚀",
    "user\nassistant\nsystem\nStop here. Stop there. END of the text",
)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``; every id is below ``vocab_size`` (at least 300).

    The ids 0 to 3 are SPECIAL_TOKENS, 4 to 259 the bytes, the rest merges. No special token is added to a prompt.
    """
    if vocab_size < 300:
        raise ValueError(f"a byte-level vocabulary needs at least 300 ids, got {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS * 2, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
