"""One Mixture-of-Experts layer: route, dispatch, combine. The experts themselves live in workers.

Letters: T tokens of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import Checkpoint
from consilium.errors import ExpertUnavailable
from consilium.gate import Routing
from consilium.kernels import gate as kernel
from consilium.kernels.float_tile import LANES
from gateway.arithmetic import Arithmetic
from gateway.attention import PRODUCTS_PER_BYTE, Batch
from gateway.batches import ExpertOutputs, combine, group_by_expert, keep_tokens, renormalised
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource


class MoELayer:
    """The gate of one layer, and the way to its experts."""

    def __init__(
        self, checkpoint: Checkpoint, layer: int, experts: ExpertSource, arithmetic: Arithmetic, clock: StageClock
    ) -> None:
        config = checkpoint.config
        name = checkpoint.names.router.format(layer=layer)
        gate = checkpoint.tensor(name, (config.num_experts, config.hidden_size)).float()  # [E, D]
        # As the kernel reads it: [D, E], filled up to whole vectors.
        self._gate = torch.zeros(config.hidden_size, -(-config.num_experts // LANES) * LANES)
        self._gate[:, : config.num_experts] = gate.T
        self._num_experts, self._top_k, self._normalize = config.num_experts, config.top_k, config.normalize_top_k
        self._layer, self._experts, self._arithmetic, self._clock = layer, experts, arithmetic, clock

    async def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; rows whose experts could not be had are noted in the batch."""
        routing = self.route(x)
        self._clock.mark("gate")
        rows, scales = self._arithmetic.expert_rows(x)
        batches = group_by_expert(rows, scales, routing, prefill=batch.prefill)
        if batch.failures:
            batches = keep_tokens(batches, batch.live_rows())
        self._clock.mark("group")
        outputs, failures = await self._experts.dispatch(self._layer, batches)
        batch.failures.update(failures)
        if outputs.stood_in:
            routing = self._stood_in(outputs, routing, batch)
        combined = combine(outputs, routing).to(x.dtype)
        outputs.release()
        self._clock.mark("combine")
        return combined

    def _stood_in(self, outputs: ExpertOutputs, routing: Routing, batch: Batch) -> Routing:
        """Note for which rows something else was done than asking a worker; the weights are those of who is left."""
        for row in outputs.stood_in:
            batch.stood_in[row] = batch.stood_in.get(row, 0) + 1
        if outputs.left_out is None:
            return routing
        routing, alone = renormalised(routing, outputs.left_out)
        for row in alone:
            error = ExpertUnavailable(f"no worker holds any of the experts that a token of layer {self._layer} needs")
            batch.failures.setdefault(row, error)
        return routing

    def route(self, x: Tensor) -> Routing:
        """The experts of every row [T, D]."""
        x = x.float().contiguous()
        rows, hidden_size = x.shape
        logits = torch.empty(rows, self._gate.shape[1])  # [T, E], filled up
        ids, weights = torch.empty(rows, self._top_k, dtype=torch.int64), torch.empty(rows, self._top_k)
        sizes = self._num_experts, self._top_k, int(self._normalize)

        def route(first: int, last: int) -> None:
            addresses = (each[first:].data_ptr() for each in (logits, ids, weights))
            gate = hidden_size, self._gate.data_ptr(), *sizes
            kernel.softmax_top_k(x[first:].data_ptr(), last - first, *gate, *addresses)

        parts = max(1, min(rows, parallel.count_slices(rows * self._gate.numel() // PRODUCTS_PER_BYTE)))
        bounds = [rows * part // parts for part in range(parts + 1)]
        parallel.run([partial(route, first, last) for first, last in pairwise(bounds)])
        return Routing(ids, weights)
