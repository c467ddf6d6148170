"""What is written of a float checkpoint: matrices folded and rounded, everything else folded and in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.compressed_tensors import hash_key, scale_name
from consilium.content_hash import content_hash
from consilium.int4 import Int4, interleave, round_int4
from consilium.quantization import Quantized, quantize_weight
from consilium.quantize.calibration import read_head
from consilium.quantize.float_layer import FloatLayer
from consilium.smoothing import Exponents, LayerExponents, Shift, fold, head_shifts, layer_shifts

BLOCK_ROWS = 4096


class Shard:
    """The tensors of one file by name, and the content hashes of the experts among them."""

    def __init__(self, shifts: Mapping[str, Shift]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.hashes: dict[str, bytes] = {}  # by hash_key
        self._shifts = shifts

    def add_float(self, name: str, tensor: Tensor) -> None:
        """A tensor that stays float."""
        self.tensors[name] = self._fold(name, tensor)

    def add_matrix(self, name: str, matrix: Tensor) -> Quantized:
        """A matrix [N, K] that becomes int8 with scales [N, 1]; what it became."""
        # A block of rows at a time: in between, a head takes as much again in float32.
        blocks = [quantize_weight(rows) for rows in self._fold(name, matrix).split(BLOCK_ROWS)]
        quantized = Quantized(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        self.tensors[name] = quantized.values
        self.tensors[scale_name(name)] = quantized.scales[:, None]
        return quantized

    def add_int4(self, name: str, matrix: Tensor) -> Int4:
        """A matrix [N, K] that becomes int4 as compressed-tensors packs it; what it became."""
        rows = round_int4(self._fold(name, matrix))
        parts = {"packed": rows.packed, "scale": rows.scales.bfloat16(), "shape": torch.tensor(matrix.shape)}
        self.tensors |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
        return interleave(rows)

    def _fold(self, name: str, tensor: Tensor) -> Tensor:
        shift = self._shifts.get(name)
        return tensor if shift is None else torch.from_numpy(fold(tensor.float().numpy(), shift))


def layer_shard(checkpoint: Checkpoint, layer: FloatLayer, exponents: LayerExponents, *, int4: bool) -> Shard:
    """Everything of one layer, its experts in int4 or int8; fused experts come apart."""
    config, names = checkpoint.config, checkpoint.names
    shard = Shard(layer_shifts(exponents, config, names, layer.layer))
    for template, norm in (
        (names.input_norm, layer.input_norm),
        (names.post_norm, layer.post_norm),
        (names.q_norm, layer.q_norm),
        (names.k_norm, layer.k_norm),
        (names.router, layer.router),
    ):
        if norm is not None:
            shard.add_float(template.format(layer=layer.layer), norm)
    for template, weight, bias in (
        (names.q_proj, layer.q, layer.q_bias),
        (names.k_proj, layer.k, layer.k_bias),
        (names.v_proj, layer.v, layer.v_bias),
        (names.o_proj, layer.o, layer.o_bias),
    ):
        name = template.format(layer=layer.layer)
        shard.add_matrix(f"{name}.weight", weight)
        if bias is not None:
            shard.add_float(f"{name}.bias", bias)
    _add_experts(shard, checkpoint, layer, int4=int4)
    return shard


def _add_experts(shard: Shard, checkpoint: Checkpoint, layer: FloatLayer, *, int4: bool) -> None:
    dense = checkpoint.names.dense
    if layer.routes:
        for expert in range(layer.experts):
            add_expert(shard, checkpoint, layer.layer, expert, layer.expert(expert), int4=int4)
    elif dense is not None:
        for template, matrix in zip((dense.gate, dense.up, dense.down), layer.expert(0), strict=True):
            shard.add_matrix(template.format(layer=layer.layer), matrix)


def add_expert(
    shard: Shard, checkpoint: Checkpoint, layer: int, expert: int, matrices: Sequence[Tensor], *, int4: bool
) -> None:
    """The gate, up and down matrices of one expert, and its content hash."""
    layout, add = checkpoint.names.experts[0], shard.add_int4 if int4 else shard.add_matrix
    templates = layout.gate, layout.up, layout.down
    found: list[Quantized | Int4] = [
        add(template.format(layer=layer, expert=expert), matrix)
        for template, matrix in zip(templates, matrices, strict=True)
    ]
    shard.hashes[hash_key(layer, expert, int4=int4)] = content_hash(found)


def embedding_shard(checkpoint: Checkpoint) -> Shard:
    """The embedding, as it is."""
    config, name = checkpoint.config, checkpoint.names.embed
    shard = Shard({})
    shard.add_float(name, checkpoint.tensor(name, (config.vocab_size, config.hidden_size)))
    return shard


def head_shard(checkpoint: Checkpoint, exponents: Exponents) -> Shard:
    """The final norm and the head, which is a tensor of its own from here on."""
    config, names = checkpoint.config, checkpoint.names
    shard = Shard(head_shifts(exponents, names))
    shard.add_float(names.final_norm, checkpoint.tensor(names.final_norm, (config.hidden_size,)))
    shard.add_matrix(names.head, read_head(checkpoint))
    return shard
