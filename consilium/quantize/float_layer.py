"""What one decoder layer computes in float32 over whole windows of text. Its experts are read one at a time.

Letters: N tokens of all windows, T of one window, D hidden size, H query heads, Hkv key-value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.gate import Routing, softmax_top_k
from consilium.rope import Rope, apply_rope


class FloatLayer:
    """The tensors of one layer, without those of its experts."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        """Raises CheckpointError for tensors that are missing, of a wrong shape, not finite, or int8 already."""
        config, names = checkpoint.config, checkpoint.names
        self.config, self.layer, self._checkpoint, self._rope = config, layer, checkpoint, Rope(config)
        hidden, queries, keys = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )

        def load(name: str, *shape: int) -> Tensor:
            return checkpoint.tensor(name.format(layer=layer), shape).float()

        def load_bias(name: str, size: int) -> Tensor | None:
            return load(f"{name}.bias", size) if config.attention_bias else None

        self.input_norm, self.post_norm = load(names.input_norm, hidden), load(names.post_norm, hidden)
        self.q, self.q_bias = load(f"{names.q_proj}.weight", queries, hidden), load_bias(names.q_proj, queries)
        self.k, self.k_bias = load(f"{names.k_proj}.weight", keys, hidden), load_bias(names.k_proj, keys)
        self.v, self.v_bias = load(f"{names.v_proj}.weight", keys, hidden), load_bias(names.v_proj, keys)
        self.o, self.o_bias = load(f"{names.o_proj}.weight", hidden, queries), load_bias(names.o_proj, hidden)
        self.q_norm = load(names.q_norm, config.head_dim) if config.qk_norm else None
        self.k_norm = load(names.k_norm, config.head_dim) if config.qk_norm else None
        self.routes = config.moe_layers[layer]
        self.router = load(names.router, config.num_experts, hidden) if self.routes else None

    @property
    def experts(self) -> int:
        """FFNs of this layer: its experts, or the one of a layer that does not route."""
        return self.config.num_experts if self.routes else 1

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return nn.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def attend(self, x: Tensor) -> Tensor:
        """The heads' outputs of one normed window [T, D] from its first position on: [T, H * d]."""
        count, dim = x.shape[0], self.config.head_dim
        cos, sin = self._rope.tables(torch.arange(count))

        def heads(weight: Tensor, bias: Tensor | None, norm: Tensor | None = None, *, rotate: bool = True) -> Tensor:
            y = nn.linear(x, weight, bias).view(count, -1, dim)
            if norm is not None:
                y = nn.rms_norm(y, (dim,), norm, self.config.rms_norm_eps)
            return (apply_rope(y, cos, sin) if rotate else y).transpose(0, 1)[None]  # [1, heads, T, d]

        q, k = heads(self.q, self.q_bias, self.q_norm), heads(self.k, self.k_bias, self.k_norm)
        v = heads(self.v, self.v_bias, rotate=False)
        window = self.config.sliding_windows[self.layer] if self.config.sliding_windows else None
        distance = torch.arange(count)[:, None] - torch.arange(count)[None, :]  # [T, T] from a query back to a key
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        out = nn.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(count, -1)

    def output(self, heads: Tensor) -> Tensor:
        """[N, H * d] -> [N, D]."""
        return nn.linear(heads, self.o, self.o_bias)

    def route(self, x: Tensor) -> Routing:
        """The experts of normed rows [N, D]; all rows to the one FFN where the layer does not route."""
        if self.router is None:
            return Routing(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))
        return softmax_top_k(nn.linear(x, self.router), self.config.top_k, normalize=self.config.gate.normalize)

    def expert(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down matrices of one FFN, read now."""
        read = self._checkpoint.expert(self.layer, expert) if self.routes else self._checkpoint.dense(self.layer)
        gate, up, down = (matrix.float() for matrix in read.floats())
        self._checkpoint.release()  # or all experts that were read would be in this process's memory
        return gate, up, down
