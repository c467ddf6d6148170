"""One Mixture-of-Experts layer: route, dispatch, combine. The experts themselves live in workers.

Letters: T tokens of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import torch.nn.functional as nn
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.gate import Routing, softmax_top_k
from consilium.quantization import quantize_rows
from gateway.attention import Batch
from gateway.batches import combine, group_by_expert, keep_tokens
from gateway.dispatcher import ExpertSource


class MoELayer:
    """The gate of one layer, and the way to its experts."""

    def __init__(self, checkpoint: Checkpoint, layer: int, experts: ExpertSource, *, int8: bool) -> None:
        config = checkpoint.config
        name = checkpoint.names.router.format(layer=layer)
        self._gate = checkpoint.tensor(name, (config.num_experts, config.hidden_size)).float()  # [E, D]
        self._top_k, self._normalize = config.top_k, config.normalize_top_k
        self._layer, self._experts, self._int8 = layer, experts, int8

    async def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; rows whose experts could not be had are noted in the batch."""
        routing = self.route(x)
        rows, scales = quantize_rows(x) if self._int8 else (x, None)
        batches = group_by_expert(rows, scales, routing)
        if batch.failures:
            batches = keep_tokens(batches, batch.live_rows())
        outputs, failures = await self._experts.dispatch(self._layer, batches)
        batch.failures.update(failures)
        return combine(outputs, routing).to(x.dtype)

    def route(self, x: Tensor) -> Routing:
        """The experts of every row [T, D]."""
        logits = nn.linear(x.float(), self._gate)  # [T, E]
        return softmax_top_k(logits, self._top_k, normalize=self._normalize)
