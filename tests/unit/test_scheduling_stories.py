"""Whatever comes and goes, in whatever order: nobody is lost, no block is, and every cache holds what it should.

The model is a hash: what a position holds depends on all the tokens up to it, so a wrong reuse shows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.kv_cache import BLOCK, KVCache, KVPool
from gateway.kv_store import KVStore
from gateway.messages import Caller, Generate, SamplingParams
from gateway.scheduler import Scheduler
from gateway.sequence import Sequence
from tests.unit.model_configs import tiny_config

CONFIG = tiny_config(num_layers=1, num_kv_heads=1)
BYTES_PER_BLOCK = 2 * CONFIG.head_dim * 4 * BLOCK
MOST_STEPS = 20_000


@dataclass(frozen=True)
class Guest:
    """One sequence of a story."""

    arrives: int  # the step before which it comes
    family: int  # prompts of one family begin alike
    shared: int
    own: int
    new: int
    priority: int
    user: str
    reports_prompt: bool
    ends: tuple[int, bool] | None  # after so many steps it is aborted, or fails

    def request(self, number: int) -> Generate:
        prompt = [self.family] * self.shared + [100 + number] * self.own
        sampling = SamplingParams(self.new, prompt_logprobs=0 if self.reports_prompt else None)
        return Generate(number, prompt, sampling, caller=Caller(user=self.user, priority=self.priority))


GUESTS = st.builds(
    Guest,
    arrives=st.integers(0, 40),
    family=st.integers(0, 2),
    shared=st.integers(1, 70),
    own=st.integers(0, 40),
    new=st.integers(0, 30),
    priority=st.sampled_from([0, 0, 0, -1, 2]),
    user=st.sampled_from(["", "x", "y"]),
    reports_prompt=st.sampled_from([False, False, False, True]),
    ends=st.none() | st.tuples(st.integers(1, 60), st.booleans()),
)


def state(tokens: list[int]) -> list[float]:
    """What each position holds: a hash of all the tokens up to it, exact in float32."""
    held, code = [], 0
    for token in tokens:
        code = zlib.crc32(token.to_bytes(4, "big"), code)
        held.append(float(code >> 8))
    return held


def write(cache: KVCache, start: int, held: list[float]) -> None:
    for position, value in enumerate(held, start):
        cache.keys[0, 0, position // BLOCK, :, position % BLOCK] = value
        cache.values[0, 0, position] = value


def read(cache: KVCache, tokens: int) -> list[float] | None:
    """What the first positions hold; None where keys and values, or their elements, differ."""
    keys = cache.keys[0, 0].transpose(1, 2).flatten(0, 1)[:tokens]  # [tokens, d]
    same = torch.equal(keys, cache.values[0, 0, :tokens]) and bool((keys == keys[:, :1]).all())
    return keys[:, 0].tolist() if same else None


class Story:
    """A scheduler with guests, and what must hold after every step."""

    def __init__(self, guests: list[Guest], queue: Scheduler, step: int) -> None:
        self.guests = dict(enumerate(guests))
        self.queue, self.step_tokens = queue, step
        self.sequences: dict[int, Sequence] = {}
        self.ended: dict[int, Sequence] = {}
        self.salt = 0  # other weights: everything that is computed from now on is different

    def step(self, now: int) -> None:
        for number, guest in self.guests.items():
            if guest.arrives == now:
                self.sequences[number] = Sequence.start(guest.request(number))
                self.queue.add(self.sequences[number])
            if guest.ends is not None and guest.arrives + guest.ends[0] == now and number not in self.ended:
                self._end(number, by_error=guest.ends[1])
        work = self.queue.schedule()
        assert sum(each.length for each in work) <= self.step_tokens
        assert len({each.sequence.id for each in work}) == len(work)
        for each in work:
            self._compute(each.sequence, each.length)
        self.check()
        for sequence in self.queue.reap():
            assert sequence.id not in self.ended
            self.ended[sequence.id] = sequence
        self.check()

    def _end(self, number: int, *, by_error: bool) -> None:
        if by_error and self.sequences[number] in self.queue.running:
            self.sequences[number].fail(ValueError("planned"))
        else:
            self.queue.abort(number)

    def _compute(self, sequence: Sequence, length: int) -> None:
        cache, start = sequence.cache, sequence.computed
        assert sequence in self.queue.running
        assert isinstance(cache, KVCache)
        assert 0 < length <= sequence.uncomputed
        assert start + length <= cache.committed <= cache.capacity
        if sequence.reusable:
            assert read(cache, start) == self._state(sequence)[:start]
            write(cache, start, self._state(sequence)[start : start + length])
        if sequence.sampling.prompt_logprobs is not None and start < sequence.prompt_length - 1:
            assert start <= sequence.prompt_reported - 1, "hidden states that are to be reported were not computed"
            sequence.prompt_reported = max(
                sequence.prompt_reported, min(start + length, sequence.prompt_length - 1) + 1
            )
        sequence.computed += length
        if sequence.finish_reason is None and not sequence.uncomputed:
            if sequence.sampling.max_tokens:
                sequence.append(500 + sequence.generated % 3, ())
            else:
                sequence.finish_reason = "length"

    def _state(self, sequence: Sequence) -> list[float]:
        return state([self.salt, *sequence.tokens])[1:]

    def check(self) -> None:
        """Every block is somebody's, and nobody is in two places."""
        store = self.queue.store
        used = sum(each.cache.blocks for each in self.queue.running if each.cache is not None)
        assert store.pool.free_blocks + store.prefixes.kept_blocks + used == store.pool.total_blocks
        assert store.pool.free_blocks >= 0
        places = [each.id for each in (*self.queue.running, *self.queue.waiting)] + list(self.ended)
        assert sorted(places) == sorted(self.sequences)
        assert all(each.cache is None and each.computed == 0 for each in self.queue.waiting)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(GUESTS, min_size=1, max_size=14),
    st.integers(10, 40),
    st.integers(1, 5),
    st.integers(1, 60),
    st.booleans(),
    st.none() | st.integers(1, 40),
)
def test_everybody_ends_and_nothing_leaks(
    guests: list[Guest], blocks: int, running: int, step: int, prefix_cache: bool, new_weights: int | None
) -> None:
    pool = KVPool(CONFIG, torch.float32, blocks * BYTES_PER_BLOCK)
    queue = Scheduler(KVStore(pool, prefix_cache=prefix_cache), running, step)
    story = Story(guests, queue, step)
    for now in range(MOST_STEPS):
        if now == new_weights:
            queue.forget_prefixes()
            story.salt = 1
        story.step(now)
        if len(story.ended) == len(guests):
            break
    assert len(story.ended) == len(guests)
    assert queue.store.used_tokens == 0
    for number, sequence in story.ended.items():
        if sequence.finish_reason == "length":
            assert sequence.generated == guests[number].new
    queue.store.prefixes.clear()
    assert pool.free_blocks == pool.total_blocks
