"""One layer of a model on the device: attention, then a dense feed-forward, or the gate of its experts.

Letters: T rows of the step, D hidden size, H query heads, d head size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.gpu.norm import activate, new_rows, rms_norm
from consilium.model_config import ModelConfig
from consilium.quantization import Quantized
from gateway.attention import read_head_norms, read_projections
from gateway.gpu.attention import attend
from gateway.gpu.batch import DeviceStep
from gateway.gpu.gate import route
from gateway.gpu.heads import HeadNorms, HeadShape, prepare
from gateway.gpu.linear import DeviceLinear
from gateway.gpu.pages import LayerPages
from gateway.matrices import read_bias, read_matrix


@dataclass(frozen=True, slots=True)
class Routed:
    """The rows of a step with their experts, on the device."""

    rows: Quantized  # [T, D]
    ids: Tensor  # [T, K] int32, ascending
    weights: Tensor  # [T, K] float32


def head_shape(config: ModelConfig) -> HeadShape:
    """The heads of every layer."""
    sizes = config.num_heads, config.num_kv_heads, config.head_dim, config.rotated_size
    return HeadShape(*sizes, config.rms_norm_eps, config.clip_qkv)


class DeviceLayer:
    """Attention, then feed-forward, each on the normed residual stream, which they add to."""

    def __init__(self, checkpoint: Checkpoint, layer: int, device: torch.device) -> None:
        config, names = checkpoint.config, checkpoint.names
        self.number, self.routes, self._config = layer, config.moe_layers[layer], config
        self._shape = head_shape(config)
        self._window = (config.sliding_windows[layer] or 0) if config.sliding_windows else 0
        self._input_norm, self._post_norm = (
            checkpoint.tensor(name.format(layer=layer), (config.hidden_size,)).float().to(device)
            for name in (names.input_norm, names.post_norm)
        )
        self._qkv = DeviceLinear(*read_projections(checkpoint, layer), device)
        self._out = _read_output(checkpoint, layer, device)
        norms = [each.to(device) for each in read_head_norms(checkpoint, layer)]
        self._norms = HeadNorms(norms[0], norms[1], config.qk_norm_whole) if norms else None
        if self.routes:
            name = names.router.format(layer=layer)
            gate = checkpoint.tensor(name, (config.num_experts, config.hidden_size))
            self._gate = gate.float().contiguous().to(device)
        else:
            ffn = checkpoint.dense(layer)
            self._gate_up = DeviceLinear([ffn.gate, ffn.up], [], device)
            self._down = DeviceLinear([ffn.down], [], device)

    def forward(
        self, x: Tensor, step: DeviceStep, turns: tuple[Tensor, Tensor], pages: LayerPages, ids: Tensor | None = None
    ) -> Routed | None:
        """Change x [T, D] float32; what is left to do are the experts, where the layer has any.

        ``ids`` int32 [T, K] is where their numbers go, if anybody wants them in a certain place.
        """
        self._attend(x, step, turns, pages)
        if self.routes:
            return self._route(x, ids)
        hidden = self._gate_up.forward(self._normed(x, self._post_norm))  # [T, 2 F]
        rows = new_rows(len(x), hidden.shape[1] // 2, x.device)
        activate(hidden, rows)
        self._down.add(rows, x)
        return None

    def _attend(self, x: Tensor, step: DeviceStep, turns: tuple[Tensor, Tensor], pages: LayerPages) -> None:
        shape = self._shape
        qkv = self._qkv.forward(self._normed(x, self._input_norm))
        queries = torch.empty(len(x), shape.heads, shape.size, dtype=pages.keys.dtype, device=x.device)
        prepare(qkv, shape, self._norms, turns, step.positions, step.slots, pages, queries)
        rows = new_rows(len(x), shape.heads * shape.size, x.device)
        attend(queries, shape, pages, step.tiles, self._window, rows)
        self._out.add(rows, x)

    def _route(self, x: Tensor, ids: Tensor | None) -> Routed:
        rows, normed = new_rows(len(x), x.shape[1], x.device), torch.empty_like(x)
        rms_norm(x, self._post_norm, self._config.rms_norm_eps, rows, normed)
        if ids is None:
            ids = torch.empty(len(x), self._config.top_k, dtype=torch.int32, device=x.device)
        weights = torch.empty(len(x), self._config.top_k, device=x.device)
        route(normed, self._gate, normalize=self._config.gate.normalize, ids=ids, weights=weights)
        return Routed(rows, ids, weights)

    def _normed(self, x: Tensor, weight: Tensor) -> Quantized:
        rows = new_rows(len(x), x.shape[1], x.device)
        rms_norm(x, weight, self._config.rms_norm_eps, rows)
        return rows


def _read_output(checkpoint: Checkpoint, layer: int, device: torch.device) -> DeviceLinear:
    config, name = checkpoint.config, checkpoint.names.o_proj.format(layer=layer)
    biased = config.attention_bias and config.output_bias
    bias = [read_bias(checkpoint, name, config.hidden_size, None, config.residual_scale)] if biased else []
    matrix = read_matrix(checkpoint, name, (config.hidden_size, config.heads_size), None, config.residual_scale)
    return DeviceLinear([matrix], bias, device)
