"""Sends the rows of a layer to the workers that hold their experts, one frame per worker, and collects the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from consilium.config import GatewayConfig
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.crew import Crew
from gateway.expert_meter import ExpertMeter
from gateway.fleet import NOBODY
from gateway.layer_call import LayerCall
from gateway.local_experts import LocalExperts
from gateway.messages import WorkerStats
from gateway.placement import Placement
from gateway.stage_clock import StageClock
from gateway.worker import Worker


class Dispatcher:
    """Knows the current placement, and who did how much work."""

    def __init__(
        self, row_dtype: torch.dtype, config: GatewayConfig, meter: ExpertMeter, local: Callable[[], LocalExperts]
    ) -> None:
        """``local`` makes what computes experts in this process, should that be needed. It raises ConsiliumError."""
        self.clock, self.meter = StageClock(), meter
        self.crew = Crew(config, local)
        self._row_dtype = row_dtype

    @property
    def placement(self) -> Placement:
        """Who is sent frames for what."""
        return self.crew.placement

    @property
    def workers(self) -> Mapping[str, Worker]:
        """By address."""
        return self.crew.workers

    def follow(self, placement: Placement, workers: Mapping[str, Worker], stated: Mapping[str, float] = NOBODY) -> None:
        """Send frames to these workers from now on; ``stated`` is µs of a row, until that is measured."""
        self.crew.follow(placement, workers, stated)

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """The output rows of ``batches.slots``, until they are released, and why rows (by index) have none.

        A frame whose worker fails is sent again to other holders of its experts; what nobody answers for by the
        layer's deadline is missing for the rows that need it, and for no others.
        """
        self.meter.add(layer, batches)
        self.crew.give_up()
        outputs = ExpertOutputs(batches.places, batches.rows.shape[1], self._row_dtype)
        call = LayerCall(self.crew, layer, batches, outputs, self.clock)
        try:
            await call.run()
        except BaseException:  # the step is given up: nobody will take what is there
            outputs.release()
            raise
        waits = call.waits
        self.clock.waited(waits.seconds, waits.queue_us / 1e6, waits.compute_us / 1e6)
        return outputs, call.rows.failures

    @property
    def same_host(self) -> bool:
        """Whether every worker is on this host, and computes on the same cores as the gateway."""
        return all(worker.local_link for worker in self.workers.values())

    def take_stats(self) -> list[WorkerStats]:
        """What each worker did since the last call."""
        return self.crew.work.take()
