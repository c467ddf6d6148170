"""How many batches a step is computed as: one, or two that take turns, attention of one beside experts of the other.

Two hide the way to the workers, and read weights twice. What two would take is predicted from what one was measured to
take; they are tried where the prediction says that they are worth it, and kept where the measurement says so, too.

Letters: T rows of the step, E experts of a layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from consilium.model_config import ModelConfig
from gateway.messages import EngineStats
from gateway.stage_clock import LAYER_STAGES, WAITS

MOST = 2
# From so many rows on a product is bound by arithmetic: half the rows take half the time, and nothing is read in vain.
MANY_ROWS = 64
TRIAL = 6  # steps that a measurement takes
REPEAT = 512  # steps until what is not done is measured again
WEIGHT = 0.2  # of the newest step in a mean
WORTH = 0.95  # of one batch's time: what two must be predicted to take before they are tried


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Mean seconds of one layer of one batch."""

    own: float  # the engine's thread computes
    way: float  # a frame and its reply travel
    experts: float  # the slowest worker computes

    def halved(self, rows: int, top_k: int, num_experts: int) -> LayerCost:
        """What a batch of half as many rows should take, of T = ``rows`` that choose their experts evenly."""

        def asked(rows: float) -> float:
            missed: float = (1 - top_k / num_experts) ** rows
            return num_experts * (1 - missed)

        reading = asked(rows / 2) / asked(rows)
        experts = 0.5 if rows * top_k / asked(rows) >= MANY_ROWS else max(0.5, reading)
        return LayerCost(self.own * (0.5 if rows >= MANY_ROWS else 1), self.way, self.experts * experts)


def alternating(half: LayerCost, *, same_host: bool) -> float:
    """Seconds of a layer of two batches like ``half``: whoever is busiest, or the way of one, is what takes longest.

    Processes on one host compute on the same cores, one after the other.
    """
    alone = half.own + half.way + half.experts
    busiest = half.own + half.experts if same_host else max(half.own, half.experts)
    return max(alone, 2 * busiest)


@dataclass(slots=True)
class _Mean:
    """Of the steps of about one size that were computed as so many batches."""

    cost: LayerCost
    seconds: float  # of a layer, all batches together
    steps: int = 1
    age: int = 0  # steps of this size since the newest of them

    def add(self, cost: LayerCost, seconds: float) -> None:
        def mixed(old: float, new: float) -> float:
            return old + WEIGHT * (new - old)

        mean = self.cost
        self.cost = LayerCost(mixed(mean.own, cost.own), mixed(mean.way, cost.way), mixed(mean.experts, cost.experts))
        self.seconds = mixed(self.seconds, seconds)
        self.steps += 1
        self.age = 0


@dataclass(slots=True)
class MicroBatches:
    """Decides for every step; ``fixed`` is what the configuration demands, None where it leaves it to measurement."""

    layers: int
    top_k: int
    num_experts: int
    fixed: int | None = None
    _means: dict[tuple[int, int], _Mean] = field(default_factory=dict)  # by size and number of batches

    @classmethod
    def of(cls, model: ModelConfig, fixed: int | None) -> MicroBatches:
        """For the layers of a model that route."""
        return cls(len(model.expert_layers()), model.top_k, model.num_experts, fixed)

    def choose(self, rows: int, sequences: int, *, same_host: bool) -> int:
        """1 or 2, for a step of so many rows of so many sequences."""
        if sequences < MOST or not self.layers:
            return 1
        if self.fixed is not None:
            return self.fixed
        size = rows.bit_length()
        one, two = self._means.get((size, 1)), self._means.get((size, 2))
        if one is None or one.steps < TRIAL or one.age >= REPEAT:
            return 1
        if two is None or two.steps < TRIAL or two.age >= REPEAT:
            predicted = alternating(self._half(one, rows), same_host=same_host)
            return 2 if predicted < WORTH * one.seconds else 1
        return 2 if two.seconds < one.seconds else 1

    def learn(self, rows: int, batches: int, stats: EngineStats) -> None:
        """What a step took that was computed as so many batches."""
        frames = sum(each.frames for each in stats.workers)
        if not frames:
            return
        seconds = sum(stats.stages[stage] for stage in LAYER_STAGES) / self.layers
        own = seconds - sum(stats.stages[stage] for stage in WAITS) / self.layers
        way = sum(each.wire_seconds for each in stats.workers) / frames
        experts = max(each.compute_seconds / each.frames for each in stats.workers if each.frames)
        cost, size = LayerCost(own / batches, way, experts), rows.bit_length()
        for count in range(1, MOST + 1):
            mean = self._means.get((size, count))
            if count == batches and mean is None:
                self._means[size, count] = _Mean(cost, seconds)
            elif count == batches and mean is not None:
                mean.steps = 0 if mean.age >= REPEAT else mean.steps  # measured anew
                mean.add(cost, seconds)
            elif mean is not None:
                mean.age += 1

    def weighed(self, rows: int) -> tuple[float, float]:
        """Seconds of a layer's way to its experts, and those that two batches cost by reading weights twice."""
        one, two = (self._means.get((rows.bit_length(), count)) for count in (1, 2))
        if one is None:
            return 0.0, 0.0
        half = self._half(one, rows) if two is None else two.cost
        return one.cost.way, max(0.0, 2 * (half.own + half.experts) - one.cost.own - one.cost.experts)

    def _half(self, one: _Mean, rows: int) -> LayerCost:
        return one.cost.halved(rows, self.top_k, self.num_experts)


def share_out(lengths: Iterable[int], count: int) -> list[list[int]]:
    """Places of sequences with so many rows each, in ``count`` parts of about as many rows; none is empty."""
    parts: list[list[int]] = [[] for _ in range(count)]
    rows = [0] * count
    for place, length in sorted(enumerate(lengths), key=lambda each: -each[1]):
        part = rows.index(min(rows))
        parts[part].append(place)
        rows[part] += length
    return [sorted(part) for part in parts if part]
