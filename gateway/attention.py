"""Grouped-query attention (Ainslie et al. 2023) over the contiguous cache of each sequence.

Letters: T rows of the step, D hidden size, H query heads, Hkv key-value heads, d head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.kernels import norm as kernel
from consilium.model_config import ModelConfig
from consilium.quantization import Quantized
from gateway.batch import Batch
from gateway.heads import Heads
from gateway.linear import Linear, LinearMaker
from gateway.matrices import halves_first, read_bias, read_matrix


class Attention:
    """Queries, keys and values of one layer, and the output projection.

    What a family does otherwise is folded into the weights as they are read: the order of a head's rotated elements,
    the scale of the scores, and the scale of what is added to the residual stream.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> None:
        config, names = checkpoint.config, checkpoint.names
        self.hidden_size = config.hidden_size
        # One product for queries, keys and values: [(H + 2 Hkv) d, D].
        qkv = maker.make(*read_projections(checkpoint, layer))
        self.projections = qkv, make_output(checkpoint, layer, maker)
        norms = read_head_norms(checkpoint, layer)
        self._whole_norms = norms if config.qk_norm_whole else []
        self._clip = config.clip_qkv
        sinks = checkpoint.tensor(names.sinks.format(layer=layer), (config.num_heads,)) if config.sinks else None
        each = [] if config.qk_norm_whole else norms
        self.heads = Heads(config, layer, each, None if sinks is None else sinks.to(torch.float32, copy=True))

    @property
    def plain(self) -> bool:
        """Whether nothing stands between the projections and the heads."""
        return not self._whole_norms and self._clip is None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; writes this step's keys and values into the caches."""
        projection, out = self.projections
        qkv = projection.forward(x).float().contiguous()
        self._norm_whole(qkv)
        if self._clip is not None:
            qkv.clamp_(-self._clip, self._clip)
        return out.forward(self.heads.attend(qkv, batch).to(x.dtype))

    def _norm_whole(self, qkv: Tensor) -> None:
        """Norm all heads of queries, then of keys, together; in place."""
        rows, width = qkv.shape
        start = qkv.data_ptr()
        for weight in self._whole_norms:
            kernel.norm_part(start, rows, width, len(weight), weight.data_ptr(), self.heads.epsilon)
            start += 4 * len(weight)


def read_projections(checkpoint: Checkpoint, layer: int) -> tuple[list[Tensor | Quantized], list[Tensor]]:
    """The matrices of queries, keys and values, and their biases, if any."""
    config, names = checkpoint.config, checkpoint.names
    heads = {names.q_proj: config.num_heads, names.k_proj: config.num_kv_heads, names.v_proj: config.num_kv_heads}
    matrices, biases = [], []
    for name, count in heads.items():
        rows = count * config.head_dim
        order = None if name == names.v_proj else halves_first(config, count)
        scale = _score_factor(config) if name == names.q_proj and not config.qk_norm else 1.0
        place = name.format(layer=layer)
        matrices.append(read_matrix(checkpoint, place, (rows, config.hidden_size), order, scale))
        if config.attention_bias:
            biases.append(read_bias(checkpoint, place, rows, order, scale))
    return matrices, biases


def read_head_norms(checkpoint: Checkpoint, layer: int) -> list[Tensor]:
    """The norms' weights for queries and keys, of every head [d] or of all heads together, or none."""
    config, names, found = checkpoint.config, checkpoint.names, []
    if not config.qk_norm:
        return []
    factor = _score_factor(config)
    for name, count in ((names.q_norm, config.num_heads), (names.k_norm, config.num_kv_heads)):
        heads = count if config.qk_norm_whole else 1
        weight = checkpoint.tensor(name.format(layer=layer), (heads * config.head_dim,))
        order = halves_first(config, heads)
        weight = weight.to(torch.float32, copy=True) if order is None else weight[order].float()
        found.append(weight * factor if name == names.q_norm and factor != 1 else weight)
    return found


def _score_factor(config: ModelConfig) -> float:
    """What queries are multiplied by, so that the scores of a family that scales them otherwise come out right."""
    return 1.0 if config.attention_scale is None else config.attention_scale * math.sqrt(config.head_dim)


def make_output(checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> Linear:
    """The output projection [D, H dv]."""
    config, name = checkpoint.config, checkpoint.names.o_proj.format(layer=layer)
    matrix = read_matrix(checkpoint, name, (config.hidden_size, config.heads_size), None, config.residual_scale)
    biases = []
    if config.attention_bias and config.output_bias:
        biases = [read_bias(checkpoint, name, config.hidden_size, None, config.residual_scale)]
    return maker.make([matrix], biases)
