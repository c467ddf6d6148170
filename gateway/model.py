"""A decoder-only transformer whose expert layers are elsewhere. Reads every tensor but the experts'.

Letters: T rows of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.rope import Rope
from gateway.arithmetic import Arithmetic
from gateway.attention import Attention
from gateway.batch import Batch, Segment
from gateway.feed_forward import DenseLayer
from gateway.fused_attention import FusedAttention
from gateway.gate_policy import GatePolicy
from gateway.latent_attention import LatentAttention
from gateway.linear import LinearMaker
from gateway.moe_layer import MoELayer
from gateway.norm import LayerNorm, RMSNorm, make_norm
from gateway.placement import Placement
from gateway.sampler import choose
from gateway.sequence import Sequence
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource
from gateway.worker_connection import WorkerConnection


class LayerEnd(Protocol):
    """What stands behind the attention of a layer."""

    async def forward(self, x: Tensor, batch: Batch) -> Tensor: ...


class Block:
    """Attention, then feed-forward, each on the normed residual stream."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        arithmetic: Arithmetic,
        experts: ExpertSource,
        clock: StageClock,
        policy: GatePolicy | None,
    ) -> None:
        config, names, dtype = checkpoint.config, checkpoint.names, arithmetic.residual_dtype
        maker = LinearMaker(dtype, arithmetic.dense)
        self._input_norm = make_norm(checkpoint, names.input_norm.format(layer=layer), dtype)
        self._post_norm = make_norm(checkpoint, names.post_norm.format(layer=layer), dtype)
        self._attention = make_attention(checkpoint, layer, maker)
        self._fused = fuse(self._input_norm, self._attention, self._post_norm, arithmetic)
        self._clock = clock
        self._feed_forward: LayerEnd = (
            MoELayer(checkpoint, layer, experts, arithmetic, clock, policy)
            if config.moe_layers[layer]
            else DenseLayer(checkpoint, layer, maker)
        )

    async def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]."""
        x, normed = self._attend(x, batch)
        self._clock.mark("attention")
        return x + await self._feed_forward.forward(normed, batch)

    def _attend(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm."""
        if self._fused is not None and self._fused.takes(len(x)):
            return self._fused.forward(x, batch)
        x = x + self._attention.forward(self._input_norm.forward(x), batch)
        return x, self._post_norm.forward(x)


def make_attention(checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> Attention | LatentAttention:
    """The kind that the model's family has."""
    latent = checkpoint.config.latent
    if latent is None:
        return Attention(checkpoint, layer, maker)
    return LatentAttention(checkpoint, layer, maker, latent)


def fuse(
    before: RMSNorm | LayerNorm, attention: Attention | LatentAttention, after: RMSNorm | LayerNorm, how: Arithmetic
) -> FusedAttention | None:
    """One kernel for all of a layer that comes before its experts; None for what that kernel does not know."""
    if not isinstance(before, RMSNorm) or not isinstance(after, RMSNorm):
        return None
    if how.dense is None or not isinstance(attention, Attention) or not attention.plain:
        return None
    return FusedAttention(before, attention, after, how.dense)


class Model:
    """Embedding, blocks, final norm and head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        arithmetic: Arithmetic,
        experts: ExpertSource,
        clock: StageClock | None = None,
        policy: GatePolicy | None = None,
    ) -> None:
        config, names, dtype = checkpoint.config, checkpoint.names, arithmetic.residual_dtype
        self.clock, self.policy = clock or StageClock(), policy
        shape = (config.vocab_size, config.hidden_size)
        self._embed = checkpoint.tensor(names.embed, shape).to(dtype)  # [V, D]
        head = self._embed if config.tie_embeddings else checkpoint.matrix(names.head, shape)
        biases = [checkpoint.tensor(names.head_bias, (config.vocab_size,))] if config.head_bias else []
        self._head = LinearMaker(dtype, arithmetic.dense).make([head], biases)
        self._embedding_scale, self._logit_divisor = config.embedding_scale, config.logit_divisor
        self._norm = make_norm(checkpoint, names.final_norm, dtype)
        self._rope = Rope(config)
        self._blocks = [
            Block(checkpoint, layer, arithmetic, experts, self.clock, policy) for layer in range(config.num_layers)
        ]

    def follow(self, placement: Placement, workers: Mapping[str, WorkerConnection]) -> None:
        """The dispatcher alone reaches workers."""

    def batch(self, tokens: list[int], segments: list[Segment]) -> Batch:
        """The rows of one step; ``tokens`` are those of the segments, one after the other."""
        positions = torch.cat([torch.arange(each.position, each.position + each.length) for each in segments])
        cos, sin = self._rope.tables(positions)
        return Batch(torch.tensor(tokens), segments, cos, sin)

    async def forward(self, batch: Batch) -> Tensor:
        """Hidden states [T, D] after the final norm. Stops early once nobody waits for any row."""
        x = self._embed[batch.tokens]
        if self._embedding_scale != 1:
            x *= self._embedding_scale
        for block in self._blocks:
            x = await block.forward(x, batch)
            if not batch.live_rows():
                break
        hidden = self._norm.forward(x)
        self.clock.mark("attention")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, V] float32."""
        logits = self._head.forward(hidden).float()
        if self._logit_divisor != 1:
            logits /= self._logit_divisor
        self.clock.mark("head")
        return logits

    def choose(self, logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
        """The next token of each sequence from its logits [S, V]; -1 where they are not finite."""
        return choose(logits, sequences, eos_token_ids)
