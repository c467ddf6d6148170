"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2") over the cache of latents that all heads share.

A head's key is W_k · latent beside a rotated part that all heads share, its value W_v · latent. The product of a query
with such a key is that of W_kᵀ · query with the latent, and the sum of values is W_v times the sum of latents. So the
heads attend to the latents themselves, as many query heads to one key-value head, and nothing else is cached: rotated
part and latent as the key, the latent as the value. The same way is taken for prompts and for single tokens, or a
position's bits would depend on how it was computed.

Letters: T rows of the step, D hidden size, H heads, r rotated elements, p plain ones, c the latent's, v a value's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import Checkpoint
from consilium.kernels import latent, norm
from consilium.kernels.float_tile import BFLOAT16, FLOAT32
from consilium.model_config import LatentConfig
from consilium.quantization import Quantized
from gateway.attention import make_output
from gateway.batch import Batch
from gateway.heads import PRODUCTS_PER_BYTE, Heads
from gateway.linear import Linear, LinearMaker
from gateway.matrices import order_of, read_bias, read_matrix

# Of the norms of the latents; DeepSeek's and transformers' code takes it, whatever config.json says of other norms.
EPSILON = np.float32(1e-6)


class HeadMatrices:
    """A matrix [K, N] for each head: [H, K, N], bfloat16 where the checkpoint has it so, else float32."""

    def __init__(self, matrices: Tensor) -> None:
        kept = torch.bfloat16 if matrices.dtype is torch.bfloat16 else torch.float32
        self._matrices = torch.empty(matrices.shape, dtype=kept).copy_(matrices)

    def multiply(self, a: Tensor, out: Tensor) -> None:
        """Rows a [T, H, K] with each head's matrix, into ``out`` [T, H, N]; both float32, of any row strides."""
        heads, size, columns = self._matrices.shape
        form = BFLOAT16 if self._matrices.dtype is torch.bfloat16 else FLOAT32
        left = a.data_ptr(), 4 * a.stride(0), 4 * a.stride(1), len(a)
        right = self._matrices.data_ptr(), heads, size, columns
        place = out.data_ptr(), 4 * out.stride(0), 4 * out.stride(1)

        def work(sharer: parallel.Sharer) -> None:
            latent.multiply_heads(form, *left, *right, *place, sharer)

        cost = max(self._matrices.nbytes, len(a) * self._matrices.numel() // PRODUCTS_PER_BYTE)
        parallel.share(work, 1, parallel.count_slices(cost))


class LatentAttention:
    """One layer's projections to queries and latents, its heads, and the output projection."""

    def __init__(self, checkpoint: Checkpoint, layer: int, maker: LinearMaker, of: LatentConfig) -> None:
        config, self._of = checkpoint.config, of
        self._heads = Heads(config, layer)
        self._count = config.num_heads
        self._projection, self._second, self._norms = self._read(checkpoint, layer, maker)
        self._to_latent, self._to_value = self._read_latent(checkpoint, layer)
        self._out = make_output(checkpoint, layer, maker)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; writes this step's latents into the caches."""
        rotated, rank = self._of.rotated_size, self._of.rank
        found = self._projection.forward(x).float().contiguous()  # [T, queries or their latent, then r + c]
        queries = found[:, : -(rotated + rank)]
        self._norm(found[:, -rank:], self._norms[-1])
        if self._second is not None:
            self._norm(queries, self._norms[0])
            queries = self._second.forward(queries.to(x.dtype)).float()
        attended = self._heads.attend(self._arrange(queries.unflatten(1, (self._count, -1)), found), batch)
        values = torch.empty(len(x), self._count, self._of.value_size)
        self._to_value.multiply(attended.view(len(x), self._count, rank), values)
        return self._out.forward(values.flatten(1).to(x.dtype))

    def _arrange(self, queries: Tensor, found: Tensor) -> Tensor:
        """Rows as the heads take them: queries [T, H, r + c], key [T, r + c] and value [T, c], one after the other."""
        rotated, size = self._of.rotated_size, self._of.rotated_size + self._of.rank
        qkv = torch.empty(len(found), (self._count + 1) * size + self._of.rank)
        places = qkv[:, : self._count * size].unflatten(1, (self._count, size))  # [T, H, r + c]
        places[..., :rotated] = queries[..., :rotated]
        self._to_latent.multiply(queries[..., rotated:], places[..., rotated:])
        qkv[:, self._count * size : -self._of.rank] = found[:, -size:]
        qkv[:, -self._of.rank :] = found[:, -self._of.rank :]
        return qkv

    def _norm(self, part: Tensor, weight: Tensor) -> None:
        """RMS norm of a part of contiguous rows [T, n], in place."""
        norm.norm_part(part.data_ptr(), len(part), part.stride(0), len(weight), weight.data_ptr(), EPSILON)

    def _read(
        self, checkpoint: Checkpoint, layer: int, maker: LinearMaker
    ) -> tuple[Linear, Linear | None, list[Tensor]]:
        """Queries (or their latent) and the cached latent as one product, queries from their latent, and the norms."""
        config, names, of = checkpoint.config, checkpoint.names, self._of
        hidden, size = config.hidden_size, of.rotated_size + of.plain_size
        assert config.attention_scale is not None
        scale = config.attention_scale * math.sqrt(config.head_dim)  # the heads divide by this root
        order = _rotated_first(of.plain_size, of.rotated_size, self._count, interleaved=config.rope.interleaved)
        latent_order = _rotated_first(of.rank, of.rotated_size, 1, interleaved=config.rope.interleaved)

        def place(template: str) -> str:
            return template.format(layer=layer)

        own = read_matrix(checkpoint, place(names.kv_a_proj), (of.rank + of.rotated_size, hidden), latent_order)
        norms = [checkpoint.tensor(place(names.kv_a_norm), (of.rank,)).to(torch.float32, copy=True)]
        first, second = place(names.q_proj), None
        if of.query_rank is None:
            queries = read_matrix(checkpoint, first, (self._count * size, hidden), order, scale)
        else:
            first, shape = place(names.q_a_proj), (self._count * size, of.query_rank)
            queries = read_matrix(checkpoint, first, (of.query_rank, hidden))
            second = maker.make([read_matrix(checkpoint, place(names.q_b_proj), shape, order, scale)])
            norms.insert(0, checkpoint.tensor(place(names.q_a_norm), (of.query_rank,)).to(torch.float32, copy=True))
        biases = []
        if config.attention_bias:
            count = self._count * size if of.query_rank is None else of.query_rank
            zeros = torch.zeros(count)  # queries from the hidden state have none
            biases = [zeros if of.query_rank is None else read_bias(checkpoint, first, count)]
            biases.append(read_bias(checkpoint, place(names.kv_a_proj), of.rank + of.rotated_size, latent_order))
        return maker.make([queries, own], biases), second, norms

    def _read_latent(self, checkpoint: Checkpoint, layer: int) -> tuple[HeadMatrices, HeadMatrices]:
        """From a query's plain part to the latent [H, p, c], and from the latent to a value [H, c, v]."""
        of, name = self._of, checkpoint.names.kv_b_proj.format(layer=layer)
        both = read_matrix(checkpoint, name, (self._count * (of.plain_size + of.value_size), of.rank))
        if isinstance(both, Quantized):
            both = both.values.float() * both.scales[:, None]
        to_latent, to_value = both.unflatten(0, (self._count, -1)).split([of.plain_size, of.value_size], dim=1)
        return HeadMatrices(to_latent), HeadMatrices(to_value.transpose(1, 2))


def _rotated_first(plain: int, rotated: int, heads: int, *, interleaved: bool) -> Tensor:
    """The order of rows that brings each head's rotated elements, its last in the checkpoint, to the front."""
    last = torch.arange(plain, plain + rotated)
    if interleaved:
        last = last[order_of(rotated, rotated, 1)]
    head = torch.cat((last, torch.arange(plain)))
    return (torch.arange(heads)[:, None] * (plain + rotated) + head).reshape(-1)
