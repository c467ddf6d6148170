"""The tokenizer in a GGUF file (byte-level BPE) as the tokenizer.json and tokenizer_config.json of Hugging Face."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from consilium.default_model.gguf_file import GgufFile
from consilium.errors import CheckpointError

# tokenizer.ggml.token_type of tokens that are matched as a whole and stand for no text, such as <|im_end|>.
_CONTROL = 3


def build_tokenizer(tokens: list[str], merges: list[str], special: list[int]) -> Tokenizer:
    """Byte-level BPE that takes every digit for itself: `tokenizer.ggml.pre` = smollm.

    ``tokens`` in the order of their ids, ``merges`` as "left right" by rank, ``special`` the ids matched whole.
    As in the original tokenizer, a byte without a token vanishes: SmolLM2's vocabulary has none for six control
    characters and for the first bytes of unassigned planes. Raises CheckpointError for a merge that is not a pair.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [_split_merge(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False) for index in special])
    return tokenizer


def read_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The file's tokenizer. Raises CheckpointError for a kind that is not this one."""
    kind = (gguf.value("tokenizer.ggml.model", str), gguf.value("tokenizer.ggml.pre", str))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"expected a tokenizer of the kind gpt2/smollm, found {'/'.join(kind)}")
    types = gguf.value("tokenizer.ggml.token_type", list)
    special = [index for index, token_type in enumerate(types) if token_type == _CONTROL]
    return build_tokenizer(
        gguf.value("tokenizer.ggml.tokens", list), gguf.value("tokenizer.ggml.merges", list), special
    )


def tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    """The tokenizer_config.json: names of the special tokens, and the chat template."""
    tokens: list[str] = gguf.value("tokenizer.ggml.tokens", list)

    def token(role: str) -> str:
        return tokens[gguf.value(f"tokenizer.ggml.{role}_token_id", int)]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_bos_token": gguf.value("tokenizer.ggml.add_bos_token", bool),
        "add_prefix_space": gguf.value("tokenizer.ggml.add_space_prefix", bool),
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.value("llama.context_length", int),
        "chat_template": gguf.value("tokenizer.chat_template", str),
    }


def _split_merge(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise CheckpointError(f"the merge {merge!r} is not a pair of tokens")
    return left, right
