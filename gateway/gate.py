"""The gate of one layer: its tensors, and the kernel that its rule asks for.

Letters: T tokens of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import Checkpoint
from consilium.gate import Routing
from consilium.gate_rule import GateRule, Scores
from consilium.kernels import gate as plain_kernel
from consilium.kernels import gate_rules as kernel
from consilium.kernels.float_tile import LANES
from gateway.gate_policy import GatePolicy
from gateway.heads import PRODUCTS_PER_BYTE


class Gate:
    """Softmax, then the K largest has a kernel of its own, all other rules share one."""

    def __init__(self, checkpoint: Checkpoint, layer: int, policy: GatePolicy | None = None) -> None:
        self._policy = policy
        config, names, rule = checkpoint.config, checkpoint.names, checkpoint.config.gate
        self._num_experts, self._top_k, self._rule = config.num_experts, config.top_k, rule
        name = names.router.format(layer=layer)
        self.matrix = by_columns(checkpoint.tensor(name, (config.num_experts, config.hidden_size)))
        self._logit_bias = self._bias(checkpoint, names.router_bias, layer) if rule.logit_bias else None
        self._correction = self._bias(checkpoint, names.correction, layer) if rule.correction else None
        self._plain = rule == GateRule(normalize=rule.normalize)
        groups = rule.groups, rule.top_groups, rule.group_members
        scores = get_args(Scores).index(rule.scores)
        self._numbers = np.array([config.num_experts, config.top_k, scores, rule.normalize, *groups], np.int64)
        self._factors = np.array([rule.least_sum, rule.scaling, 2 * rule.jitter], np.float32)

    def route(self, x: Tensor) -> Routing:
        """The experts of every row [T, D]."""
        x = x.float().contiguous()
        rows = len(x)
        ids, weights = torch.empty(rows, self._top_k, dtype=torch.int64), torch.empty(rows, self._top_k)
        scratch = torch.empty(rows, 1 if self._plain else 2, self.matrix.shape[1])  # [T, 1 or 2, E], filled up

        def work(first: int, last: int) -> None:
            own = [each[first:].data_ptr() for each in (scratch, ids, weights)]
            self._run(x[first:].data_ptr(), last - first, *own)

        parts = max(1, min(rows, parallel.count_slices(rows * self.matrix.numel() // PRODUCTS_PER_BYTE)))
        bounds = [rows * part // parts for part in range(parts + 1)]
        parallel.run([partial(work, first, last) for first, last in pairwise(bounds)])
        routing = Routing(ids, weights)
        if self._policy is None:
            return routing
        return self._policy.apply(routing, self._scores(scratch, bounds) if self._policy.needs_scores else None)

    def _scores(self, scratch: Tensor, bounds: list[int]) -> Tensor:
        """[T, E], which come before whatever else the scratch of a part has."""
        width = scratch.shape[2]
        parts = [scratch[first:last].view(-1, last - first, width)[0] for first, last in pairwise(bounds)]
        return torch.cat(parts)[:, : self._num_experts]

    def _run(self, x: int, rows: int, scratch: int, ids: int, weights: int) -> None:
        left = x, rows, self.matrix.shape[0], self.matrix.data_ptr()
        if self._plain:
            sizes = self._num_experts, self._top_k, int(self._rule.normalize)
            plain_kernel.softmax_top_k(*left, *sizes, scratch, ids, weights)
            return
        biases = [0 if each is None else each.data_ptr() for each in (self._logit_bias, self._correction)]
        numbers = self._numbers.ctypes.data, self._factors.ctypes.data
        kernel.route(*left, *biases, *numbers, scratch, ids, weights)

    def _bias(self, checkpoint: Checkpoint, template: str, layer: int) -> Tensor:
        """A number for each expert, [E]; some families store it as [1, E]."""
        name = template.format(layer=layer)
        shape = checkpoint.shape(name)
        wide = (1, self._num_experts)
        bias = checkpoint.tensor(name, wide if shape == wide else (self._num_experts,))
        return bias.reshape(-1).to(torch.float32, copy=True)


def by_columns(matrix: Tensor) -> Tensor:
    """A matrix [N, D] as the kernels of float products read it: [D, N] float32, N filled up to whole vectors."""
    filled = torch.zeros(matrix.shape[1], -(-len(matrix) // LANES) * LANES)
    filled[:, : len(matrix)] = matrix.T
    return filled
