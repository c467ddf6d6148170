"""From measured times to plain words: what a layer waits for, and whether splitting pays here. Pure.

Letters: T tokens in a step, K experts per token, E experts in a layer, W workers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FEW, MANY = 1, 32  # rows of one expert in the two calls that are timed
BATCHES = (1, 32)  # tokens of a step that the verdict speaks of
MEMORY_BOUND = MANY / 4  # 32 rows that cost less than this many times one row mostly wait for the weights


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured of one worker, in seconds."""

    round_trip: float  # of an empty call
    seconds_per_byte: float
    few: float  # one expert, FEW rows
    many: float  # one expert, MANY rows

    def expert_seconds(self, rows: float) -> float:
        """One expert with so many rows, between and beyond the two that were measured."""
        return max(0.0, self.few + (self.many - self.few) * (rows - FEW) / (MANY - FEW))


@dataclass(frozen=True, slots=True)
class Split:
    """How a model lies on the workers."""

    layers: int  # that have experts
    experts: int  # E
    top_k: int  # K
    workers: int  # W that share a layer's experts; replicas do not count
    sent_bytes: int  # of one row on the way to a worker
    returned_bytes: int  # of one row on the way back


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What one layer of a step waits for, in seconds."""

    tokens: int
    way: float
    experts: float  # on the busiest worker
    together: float  # all its experts one after the other on one worker, which is without a way

    @property
    def hop_share(self) -> float:
        """Of the waiting that is the way."""
        return self.way / (self.way + self.experts)

    @property
    def gain(self) -> float:
        """How many times as fast as one process with all the experts."""
        return self.together / (self.way + self.experts)


def layer_time(timings: Sequence[Timing], split: Split, tokens: int) -> LayerTime:
    """The slowest worker counts; the gate spreads tokens over experts, and experts over workers, evenly."""
    pairs = tokens * split.top_k
    chosen = split.experts * (1 - (1 - split.top_k / split.experts) ** tokens)  # experts with any row, on average
    mine = max(1.0, chosen / split.workers)
    of_one = max(each.expert_seconds(pairs / chosen) for each in timings)
    moved = tokens * split.sent_bytes + pairs / split.workers * split.returned_bytes
    way = max(each.round_trip + moved * each.seconds_per_byte for each in timings)
    return LayerTime(tokens, way, mine * of_one, chosen * of_one)


def explain(timings: Sequence[Timing], split: Split) -> list[str]:
    """Sentences for the operator."""
    sentences = [f"A token passes {_count(split.layers, 'layer')} with experts."]
    for tokens in BATCHES:
        time = layer_time(timings, split, tokens)
        most = tokens / (split.layers * (time.way + time.experts))
        sentences.append(
            f"With {_count(tokens, 'token')} in a step a layer waits {_ms(time.way)} for the way and "
            f"{_ms(time.experts)} for the experts: the way is {time.hop_share:.0%} of it, and {most:.0f} tokens a "
            "second is the most that experts and way allow."
        )
        sentences.append(_pays(time, split.workers))
    if split.workers > 1:
        sentences.append("Workers were timed one at a time: those on one machine share its memory and cores.")
    return [*sentences, _limit(timings, layer_time(timings, split, BATCHES[0]))]


def _pays(time: LayerTime, workers: int) -> str:
    alone = f"all the experts in one process would take {_ms(time.together)}"
    if workers < 2:
        return f"One worker holds all the experts; {alone}, so the way costs {1 / time.gain:.1f} times."
    if time.gain > 1.05:
        return f"Splitting over {workers} workers pays there: {alone}, {time.gain:.1f} times as long."
    if time.gain > 0.95:
        return f"Splitting over {workers} workers makes no difference in speed there: {alone}."
    return (
        f"Splitting over {workers} workers does not pay in speed there: {alone}. It pays where the model is too large "
        "for one machine, or where it must survive the loss of a worker."
    )


def _limit(timings: Sequence[Timing], one: LayerTime) -> str:
    slowest = max(timings, key=lambda each: each.few)
    ratio = slowest.many / slowest.few
    compared = f"{MANY} rows of an expert take {ratio:.1f} times as long as one"
    if one.hop_share > 0.5:
        return (
            "At one token the way limits: put gateway and workers on one host or a faster network, or serve more "
            "requests at once."
        )
    if ratio < MEMORY_BOUND:
        return f"Reading the weights limits ({compared}): more memory bandwidth, or more requests at once, help."
    return f"Arithmetic limits ({compared}): more or faster cores help."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
