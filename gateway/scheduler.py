"""Which sequences compute how many tokens in the next step: continuous batching (Yu et al. 2022, "Orca").

Generating sequences come first, then prompts in chunks up to the step's budget, with waiting sequences admitted as far
as there is room for their prompts. Where growing sequences find no room, the least urgent one gives way: what it has
computed goes to the prefix cache, and what is not there any more by its next turn is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from consilium.errors import InvalidRequest
from gateway.fair_share import GENERATED_WEIGHT, PROMPT_WEIGHT, FairShare
from gateway.kv_cache import BLOCK
from gateway.kv_store import KVStore
from gateway.prefix_cache import common_tokens
from gateway.sequence import Sequence
from gateway.waiting import WaitingQueue

_LOOKAHEAD = 16  # waiting sequences that find no room before the search for one that does is given up
_MOST_LOOKED_AT = 256
_MOST_OVERTAKEN = 32  # then nobody is admitted until there is room for the one that waits


@dataclass(frozen=True, slots=True)
class Work:
    """The next ``length`` uncomputed tokens of one sequence."""

    sequence: Sequence
    length: int


class Scheduler:
    """Holds every sequence from its arrival to its end."""

    def __init__(self, store: KVStore, max_running: int, max_step_tokens: int) -> None:
        self.store = store
        self.running: list[Sequence] = []
        self._shares = FairShare()
        self.waiting = WaitingQueue(self._shares)
        self._arrivals, self._preemptions, self._turn = 0, 0, 0
        self._max_running, self._max_step_tokens = max_running, max_step_tokens
        self._plan: dict[Sequence, int] = {}  # tokens of each sequence in the step that is being put together

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that could never fit fails at once."""
        total = self.store.pool.total_tokens
        if sequence.capacity > total:
            sequence.fail(
                InvalidRequest(
                    f"prompt and completion take {sequence.capacity} tokens, and gateway.kv_cache_memory "
                    f"holds {total}; ask for fewer tokens or allow more memory"
                )
            )
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.add(sequence)

    def abort(self, sequence_id: int) -> Sequence | None:
        """End a sequence that nobody waits for; it leaves with the next :meth:`reap`. None for unknown ones."""
        sequences: tuple[Sequence, ...] = (*self.running, *self.waiting)
        for sequence in sequences:
            if sequence.id == sequence_id and sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                return sequence
        return None

    def forget_prefixes(self) -> None:
        """Reuse nothing that was computed up to now: other weights, or another arithmetic, compute from here on."""
        self.store.forget(self.running)

    def take_preemptions(self) -> int:
        """How often a sequence had to give way since the last call."""
        preemptions, self._preemptions = self._preemptions, 0
        return preemptions

    def reap(self) -> list[Sequence]:
        """Take out the sequences that have ended; what they have computed may be kept."""
        running = [each for each in self.running if each.finish_reason]
        waiting = [each for each in self.waiting if each.finish_reason]
        for sequence in waiting:
            self.waiting.remove(sequence)
        for sequence in running:
            # What an error leaves behind is not worth a doubt.
            self.store.release(sequence, keep=sequence.finish_reason != "error")
        if running:
            self.running = [each for each in self.running if not each.finish_reason]
        return running + waiting

    def schedule(self) -> list[Work]:
        """The work of the next step; empty when nothing can run."""
        self._turn += 1
        self._plan = {}
        for sequence in self.running:
            self.store.publish(sequence)
        self._plan_generating()
        if budget := self._max_step_tokens - len(self._plan):
            self._admit(budget)
            # Some that generate may have given way to a newcomer.
            budget = self._max_step_tokens - len(self._plan)
            unplanned = [each for each in self.running if each not in self._plan]
            for sequence, length in share_out(unplanned, budget).items():
                if sequence.cache is not None and self._grow(sequence, sequence.computed + length):
                    self._plan[sequence] = length
        for sequence in self._plan:
            sequence.turn = self._turn
        return [Work(sequence, length) for sequence, length in self._plan.items()]

    def _plan_generating(self) -> None:
        """One token each, before any prompt, so that a long prompt delays nobody's next token by more than a chunk.

        Whoever was longest without comes first: the budget may be smaller than their number.
        """
        generating = [each for each in self.running if not each.reading]
        for sequence in sorted(generating, key=lambda each: (each.priority, each.turn)):
            if len(self._plan) == self._max_step_tokens:
                break
            if sequence.cache is not None and self._grow(sequence, len(sequence.tokens)):
                self._plan[sequence] = 1
                if sequence.generated:
                    self._shares.charge(sequence.client, GENERATED_WEIGHT)

    def _admit(self, budget: int) -> None:
        """Start waiting sequences as long as there are some that would get tokens in this step."""
        while (sequence := self._next(budget)) is not None:
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.store.start(sequence)
            if sequence.leave_queue():
                self._shares.charge(sequence.client, PROMPT_WEIGHT * sequence.uncomputed)

    def _next(self, budget: int) -> Sequence | None:
        """The first that can start. It may overtake some that find no room, but none of them too often."""
        overtaken: list[Sequence] = []
        for sequence in self.waiting.candidates(_MOST_LOOKED_AT):
            if not self._would_run(sequence, budget) or self._has_forerunner(sequence):
                continue
            if self._has_place(sequence) or self._make_way(sequence):
                for each in overtaken:
                    each.overtaken += 1
                return sequence
            if len(self.running) >= self._max_running or sequence.overtaken >= _MOST_OVERTAKEN:
                return None
            overtaken.append(sequence)
            if len(overtaken) == _LOOKAHEAD:
                return None
        return None

    def _would_run(self, sequence: Sequence, budget: int) -> bool:
        reading = [each for each in self.running if each not in self._plan]
        return share_out([*reading, sequence], budget).get(sequence, 0) > 0

    def _has_forerunner(self, sequence: Sequence) -> bool:
        """Whether somebody is computing what this one can copy soon, as with the n choices of a request."""
        if not self.store.prefixes.enabled:
            return False
        return any(
            each.reading
            and each.reusable
            and each.priority <= sequence.priority
            and min(common_tokens(each.key, sequence.key), sequence.most_reused) >= each.computed + BLOCK
            for each in self.running
        )

    def _has_place(self, sequence: Sequence) -> bool:
        return len(self.running) < self._max_running and self.store.fits(sequence)

    def _make_way(self, sequence: Sequence) -> bool:
        """Preempt less urgent sequences for a waiting one, if that is enough; else nothing happens."""
        victims = sorted((each for each in self.running if each.priority > sequence.priority), key=_place)
        if not victims or not self.store.could_fit(sequence, victims):
            return False
        while not self._has_place(sequence):
            self._preempt(victims.pop())
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for ``tokens`` positions; False when the sequence itself had to give way."""
        while not self.store.grow(sequence, tokens):
            victim = max(self.running, key=_place)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._plan.pop(victim, None)
        self.store.release(victim, keep=True)
        victim.restart()
        self.waiting.add(victim)
        self._preemptions += 1


def share_out(sequences: Iterable[Sequence], budget: int) -> dict[Sequence, int]:
    """How many of a step's tokens each prompt gets.

    Half goes to the first that came, the rest to the shortest: so nobody waits for ever, and nobody short for a long
    one. More urgent prompts come before all others.
    """
    shares: dict[Sequence, int] = {}
    classes: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        classes.setdefault(sequence.priority, []).append(sequence)
    for priority in sorted(classes):
        first, *others = sorted(classes[priority], key=lambda each: each.arrival)
        shares[first] = min(first.uncomputed, -(-budget // 2))
        budget -= shares[first]
        for sequence in sorted(others, key=lambda each: (each.uncomputed, each.arrival)):
            shares[sequence] = min(sequence.uncomputed, budget)
            budget -= shares[sequence]
        more = min(first.uncomputed - shares[first], budget)
        shares[first] += more
        budget -= more
    return {sequence: length for sequence, length in shares.items() if length}


def _place(sequence: Sequence) -> tuple[int, int]:
    """The order of urgency; the last one gives way first."""
    return sequence.priority, sequence.arrival
