"""A decoder-only transformer on a device: what gateway.model is on the CPU. The experts may be elsewhere.

Letters: T rows of the step, D hidden size, V vocabulary, S sequences that get a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import WireError
from consilium.gpu.norm import new_rows, rms_norm
from consilium.gpu.quantize import quantize_rows
from consilium.gpu.tally import Tally
from consilium.rope import Rope
from gateway.batch import Segment, StepRows
from gateway.device_hops import DeviceHops, DeviceWorker
from gateway.expert_meter import ExpertMeter
from gateway.gate_policy import GatePolicy
from gateway.gpu.arena_experts import ArenaExperts
from gateway.gpu.batch import DeviceStep, StepShape, aligned, fits_a_graph, numbers_of, shape_of, to_device, view
from gateway.gpu.choose import choose, warm_up
from gateway.gpu.combine import combine
from gateway.gpu.experts import ExpertHalf
from gateway.gpu.graphs import Graphs
from gateway.gpu.layer import DeviceLayer, Routed, head_shape
from gateway.gpu.linear import DeviceLinear
from gateway.gpu.pages import PagePool
from gateway.gpu.tiling import Tiling
from gateway.local_experts import run_now
from gateway.placement import Placement
from gateway.sequence import Sequence
from gateway.stage_clock import StageClock

T = TypeVar("T")
WARM_ROWS = (1, 24, 200, 400)  # for each of the tiles of products and of the gate
Run = Callable[[Hashable, Callable[[], T]], T]


class DeviceModel:
    """Embedding, layers, final norm and head."""

    policy: GatePolicy | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: ExpertHalf,
        make_pool: Callable[[], PagePool],
        tilings: tuple[Tiling, Tiling],
        device: torch.device,
        clock: StageClock | None = None,
        hops: DeviceHops | None = None,
        meter: ExpertMeter | None = None,
    ) -> None:
        """``make_pool`` is called last: keys and values take of the memory that is left.

        Steps go through ``hops`` where they are open, else, and where that fails, to ``experts``.
        ``tilings`` are those of decoding steps, and of steps with prompts. ``meter`` is told of the rows that no
        dispatcher hears of.
        """
        config, names = checkpoint.config, checkpoint.names
        self.clock, self._experts, self._tilings, self._device = clock or StageClock(), experts, tilings, device
        shape = (config.vocab_size, config.hidden_size)
        embed = checkpoint.tensor(names.embed, shape)
        head = embed if config.tie_embeddings else checkpoint.matrix(names.head, shape)
        self._embed, self._head = embed.to(device), DeviceLinear([head], [], device)
        self._norm = checkpoint.tensor(names.final_norm, (config.hidden_size,)).float().to(device)
        self._epsilon, self._heads = config.rms_norm_eps, head_shape(config)
        cos, sin = Rope(config).tables(torch.arange(config.max_position))
        self._turns = cos.contiguous().to(device), sin.contiguous().to(device)
        self.hops = hops  # None: there is no such way
        self._arena: ArenaExperts | None = None  # the one that is open
        self._expert_layers, self._top_k = config.expert_layers(), config.top_k
        self._tally, self._meter = Tally(config.num_layers, config.num_experts, device), meter
        self._layers = [DeviceLayer(checkpoint, layer, device) for layer in range(config.num_layers)]
        self._graphs = Graphs(device)
        self._kept: dict[StepShape, tuple[Tensor, Tensor]] = {}  # of each graph: its numbers, and its residual stream
        self.pool = make_pool()

    def follow(self, placement: Placement, workers: Mapping[str, DeviceWorker]) -> None:
        """Those on this machine's GPUs may be reached without the dispatcher."""
        if self.hops is not None:
            self.hops.follow(placement, workers)

    def batch(self, tokens: list[int], segments: list[Segment]) -> StepRows:
        """The rows of one step; ``tokens`` are those of the segments, one after the other."""
        return StepRows(torch.tensor(tokens), segments)

    async def forward(self, batch: StepRows) -> Tensor:
        """Hidden states [T, D] after the final norm. Stops early once nobody waits for any row."""
        arena = self._open_arena()
        hidden = None
        if arena is not None and arena.takes(batch):
            hidden = await self._through(arena, batch)
        if hidden is None:
            hidden = await self._forward(batch, self._experts, self._graphs)
        self.clock.mark("attention")
        return hidden[: len(batch.tokens)]

    async def _forward(self, batch: StepRows, experts: ExpertHalf, graphs: Graphs) -> Tensor:
        graph = fits_a_graph(batch)
        shape = shape_of(batch, self._tilings[batch.prefill], self._heads, graph=graph)
        step, x = self._upload(batch, shape, keep=graph and graphs.enabled)
        if isinstance(experts, ArenaExperts):
            experts.hop.begin(shape.rows)
        if self._meter is not None and not experts.awaits:
            self._meter.add_later(self._tally)
        if not graph:
            return await self._pass(batch, step, x, experts, lambda _, launch: launch())
        if experts.awaits:
            return await self._pass(batch, step, x, experts, lambda part, launch: graphs.run((shape, part), launch))
        whole = partial(self._pass, batch, step, x, experts, lambda _, launch: launch())
        return graphs.run(shape, lambda: run_now(whole()))

    def _open_arena(self) -> ArenaExperts | None:
        """What steps go through now."""
        hop = None if self.hops is None else self.hops.current()
        if hop is None:
            self._arena = None
        elif self._arena is None or self._arena.hop is not hop:
            self._arena = ArenaExperts(hop, self._expert_layers, self._device)
        return self._arena

    async def _through(self, arena: ArenaExperts, batch: StepRows) -> Tensor | None:
        """As the other way; None where the step came to nothing, or came to other bits than the other way."""
        assert self.hops is not None
        hidden = await self._forward(batch, arena, arena.graphs)
        lost = arena.hop.failed(int(arena.hop.arena.broken))  # waits for the device
        if not lost and self.hops.audits():
            again = await self._forward(batch, self._experts, self._graphs)
            rows = len(batch.tokens)
            if batch.failures or torch.equal(hidden[:rows].view(torch.int32), again[:rows].view(torch.int32)):
                return again
            lost = {each.address: WireError("its step has other bits than its frames") for each in arena.hop.members}
        if lost:
            self.hops.failed(lost)
        return None if lost else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, V] float32."""
        logits = self._head.forward(quantize_rows(hidden.contiguous()))
        self.clock.mark("head")
        return logits

    def choose(self, logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
        """The next token of each sequence from its logits [S, V]; -1 where they are not finite."""
        return choose(logits, sequences, eos_token_ids)

    def warm_up(self) -> None:
        """Compile what steps of all sizes need, so that no request waits for it: takes a minute the first time."""
        room = min(self.pool.total_tokens, 2 * max(each.chunk for each in self._tilings))
        cache, kinds = self.pool.allocate(room, room), {layer.routes: layer for layer in self._layers}
        for rows in (min(room, each) for each in WARM_ROWS):
            for first in (0, room - rows):
                batch = StepRows(torch.zeros(rows, dtype=torch.int64), [Segment(cache, 0, rows, first)])
                shape = shape_of(batch, self._tilings[batch.prefill], self._heads, graph=False)
                step, x = self._upload(batch, shape, keep=False)
                x.copy_(self._embed[step.tokens])
                for layer in kinds.values():
                    routed = layer.forward(x, step, self._turns, self.pool.layer(layer.number))
                    if routed is not None:
                        self._add_experts(x, layer.number, routed, batch)
                warm_up(self.logits(self._last_norm(x)))
        self.pool.free(cache)

    def _add_experts(self, x: Tensor, layer: int, routed: Routed, batch: StepRows) -> None:
        """Experts that are here, or zeros for those that are not."""
        if not self._experts.awaits:
            combine(x, *run_now(self._experts.forward(layer, routed, batch)))
            return
        zeros = torch.zeros(routed.ids.numel(), x.shape[1], dtype=torch.bfloat16, device=x.device)
        combine(x, zeros, routed.weights)

    async def _pass(
        self, batch: StepRows, step: DeviceStep, x: Tensor, experts: ExpertHalf, run: Run[Routed | Tensor | None]
    ) -> Tensor:
        """All layers; ``run`` launches one part after the other, between which the host has its say."""
        ids = None if experts.awaits else self._room_for_ids(len(x))
        for layer in self._layers:
            place = None if ids is None else ids[layer.number]
            routed = run(layer.number, partial(self._launch, layer, step, x, place))
            if isinstance(routed, Routed):
                self.clock.mark("attention")
                rows, weights = await experts.forward(layer.number, routed, batch)
                combine(x[: len(weights)], rows, weights)
            if not batch.live_rows():
                break
        if ids is not None:
            self._tally.add(ids, step.live)
        hidden = run("norm", partial(self._last_norm, x))
        assert isinstance(hidden, Tensor)
        return hidden

    def _launch(self, layer: DeviceLayer, step: DeviceStep, x: Tensor, ids: Tensor | None) -> Routed | None:
        """A layer up to its experts; the first one begins with the embedding."""
        if layer is self._layers[0]:
            x.copy_(self._embed[step.tokens])
        return layer.forward(x, step, self._turns, self.pool.layer(layer.number), ids)

    def _room_for_ids(self, rows: int) -> Tensor:
        """[L, T, K] where nobody asks for any expert yet; L are all layers, each ALIGNED."""
        pairs = rows * self._top_k
        room = torch.full((len(self._layers), aligned(pairs)), -1, dtype=torch.int32, device=self._device)
        return room[:, :pairs].view(-1, rows, self._top_k)

    def _last_norm(self, x: Tensor) -> Tensor:
        hidden = torch.empty_like(x)
        rms_norm(x, self._norm, self._epsilon, new_rows(len(x), x.shape[1], x.device), hidden)
        return hidden

    def _upload(self, batch: StepRows, shape: StepShape, *, keep: bool) -> tuple[DeviceStep, Tensor]:
        """The step's numbers, and room for its residual stream [T, D]: for a graph always in the same place."""
        numbers = to_device(numbers_of(batch, shape), self._device)
        if not keep:
            return view(numbers, shape), torch.empty(shape.rows, self._embed.shape[1], device=self._device)
        if shape not in self._kept:
            x = torch.empty(shape.rows, self._embed.shape[1], device=self._device)
            self._kept[shape] = torch.empty_like(numbers), x
        place, x = self._kept[shape]
        place.copy_(numbers)
        return view(place, shape), x
