"""Which sequences compute how many tokens in the next step: continuous batching (Yu et al. 2022, "Orca").

Running sequences come first, then prompts in chunks up to the step's budget, then waiting sequences as far as
there is room for their prompts. Where growing sequences find no room, the one that came last is preempted: its
cache is freed, and it is computed again from its tokens later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from consilium.errors import InvalidRequest
from gateway.kv_cache import KVPool
from gateway.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """The next ``length`` uncomputed tokens of one sequence."""

    sequence: Sequence
    length: int


class Scheduler:
    """Holds every sequence from its arrival to its end."""

    def __init__(self, pool: KVPool, max_running: int, max_step_tokens: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._preemptions, self._turn = 0, 0
        self._max_running, self._max_step_tokens = max_running, max_step_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that could never fit fails at once."""
        if sequence.capacity > self.pool.total_tokens:
            sequence.fail(
                InvalidRequest(
                    f"prompt and completion take {sequence.capacity} tokens, and gateway.kv_cache_memory "
                    f"holds {self.pool.total_tokens}; ask for fewer tokens or allow more memory"
                )
            )
        self.waiting.append(sequence)

    def abort(self, sequence_id: int) -> None:
        """End a sequence that nobody waits for; it leaves with the next :meth:`reap`."""
        for sequence in (*self.running, *self.waiting):
            if sequence.id == sequence_id and sequence.finish_reason is None:
                sequence.finish_reason = "abort"

    def take_preemptions(self) -> int:
        """How often a sequence had to give way since the last call."""
        preemptions, self._preemptions = self._preemptions, 0
        return preemptions

    def reap(self) -> list[Sequence]:
        """Take out the sequences that have ended and free what they held."""
        ended = [each for each in (*self.running, *self.waiting) if each.finish_reason]
        if ended:
            for sequence in ended:
                self._release(sequence)
            self.running = [each for each in self.running if not each.finish_reason]
            self.waiting = deque(each for each in self.waiting if not each.finish_reason)
        return ended

    def schedule(self) -> list[Work]:
        """The work of the next step; empty when nothing can run."""
        budget = self._max_step_tokens
        self._turn += 1
        work: list[Work] = []
        # Generating sequences before prompts, so that a long prompt delays nobody's next token by more than a chunk.
        # Among those, whoever was longest without: the budget may be smaller than their number.
        for sequence in sorted(self.running, key=_urgency):
            length = min(sequence.uncomputed, budget)
            if length and sequence in self.running and self._grow(sequence, sequence.computed + length):
                work.append(Work(sequence, length))
                budget -= length
                sequence.turn = self._turn
        work = [each for each in work if each.sequence.cache is not None]  # without those preempted meanwhile
        while budget and self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self.pool.can_hold(min(len(sequence.tokens) + 1, sequence.capacity)):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.leave_queue()
            length = min(sequence.uncomputed, budget)
            sequence.cache = self.pool.allocate(len(sequence.tokens), sequence.capacity)
            work.append(Work(sequence, length))
            budget -= length
            sequence.turn = self._turn
        return work

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for ``tokens`` positions; False when the sequence itself had to give way."""
        assert sequence.cache is not None
        while not self.pool.grow(sequence.cache, tokens):
            victim = self.running.pop()
            self._release(victim)
            victim.computed = 0
            self.waiting.appendleft(victim)
            self._preemptions += 1
            if victim is sequence:
                return False
        return True

    def _release(self, sequence: Sequence) -> None:
        if sequence.cache is not None:
            self.pool.free(sequence.cache)
            sequence.cache = None


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    """Prompts in the order they came, generating sequences by the last step they were part of."""
    generating = sequence.uncomputed == 1
    return (not generating, sequence.turn if generating else 0)
