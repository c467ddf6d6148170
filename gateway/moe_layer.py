"""One Mixture-of-Experts layer: route, dispatch, combine. The experts themselves live in workers.

Letters: T tokens of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import ExpertUnavailable
from consilium.gate import Routing
from gateway.arithmetic import Arithmetic
from gateway.batch import Batch, StepRows
from gateway.batches import ExpertOutputs, combine, group_by_expert, keep_tokens, renormalised
from gateway.feed_forward import SharedExperts
from gateway.gate import Gate
from gateway.gate_policy import GatePolicy
from gateway.linear import LinearMaker
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource


class MoELayer:
    """The gate of one layer, and the way to its experts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        experts: ExpertSource,
        arithmetic: Arithmetic,
        clock: StageClock,
        policy: GatePolicy | None = None,
    ) -> None:
        self.gate = Gate(checkpoint, layer, policy)
        maker = LinearMaker(arithmetic.residual_dtype, arithmetic.dense)
        self._shared = SharedExperts(checkpoint, layer, maker) if checkpoint.config.shared_size else None
        self._layer, self._experts, self._arithmetic, self._clock = layer, experts, arithmetic, clock

    async def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; rows whose experts could not be had are noted in the batch."""
        routing = self.gate.route(x)
        self._clock.mark("gate")
        rows, scales = self._arithmetic.expert_rows(x)
        batches = group_by_expert(rows, scales, routing, prefill=batch.prefill)
        if batch.failures:
            batches = keep_tokens(batches, batch.live_rows())
        self._clock.mark("group")
        outputs, failures = await self._experts.dispatch(self._layer, batches)
        batch.failures.update(failures)
        if outputs.stood_in:
            routing = stood_in(self._layer, outputs, routing, batch)
        combined = combine(outputs, routing)
        outputs.release()
        self._clock.mark("combine")
        return (combined if self._shared is None else combined + self._shared.forward(x)).to(x.dtype)


def stood_in(layer: int, outputs: ExpertOutputs, routing: Routing, batch: StepRows) -> Routing:
    """Note for which rows something else was done than asking a worker; the weights are those of who is left."""
    for row in outputs.stood_in:
        batch.stood_in[row] = batch.stood_in.get(row, 0) + 1
    if outputs.left_out is None:
        return routing
    routing, alone = renormalised(routing, outputs.left_out)
    for row in alone:
        error = ExpertUnavailable(f"no worker holds any of the experts that a token of layer {layer} needs")
        batch.failures.setdefault(row, error)
    return routing
