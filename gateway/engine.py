"""The engine: takes sequences, runs the model over them step by step, and says what came out.

Letters: T rows of the step, D hidden size, V vocabulary, S sequences that get a token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from gateway.batch import Segment, StepRows
from gateway.dispatcher import Dispatcher
from gateway.engine_model import EngineModel
from gateway.mailbox import Mailbox
from gateway.messages import EngineStats, Generate, Output, Step, TokenLogprobs
from gateway.micro_batches import MicroBatches, share_out
from gateway.sampler import token_logprobs
from gateway.scheduler import Scheduler, Work
from gateway.sequence import Sequence

LOGIT_ROWS = 64  # most prompt rows whose logits exist at once: with a vocabulary of 150k they take 38 MB


@dataclass(slots=True)
class Engine:
    """One model and everything that runs on it."""

    model: EngineModel
    scheduler: Scheduler
    dispatcher: Dispatcher
    mailbox: Mailbox
    eos_token_ids: tuple[int, ...]
    micro_batches: MicroBatches
    _current: dict[int, tuple[StepRows, Segment]] = field(default_factory=dict, init=False)  # of the step, by sequence
    _stood_in: int = field(default=0, init=False)  # of the step, rows for which an expert had no worker

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Generate) -> None:
        """Queue a new sequence."""
        self.scheduler.add(Sequence.start(request, self.eos_token_ids))

    def abort(self, sequence_id: int) -> None:
        """End a sequence that nobody waits for; in the middle of a step, its rows go no further than this layer."""
        sequence = self.scheduler.abort(sequence_id)
        if sequence is not None and sequence_id in self._current:
            batch, segment = self._current[sequence_id]
            reason = ConsiliumError("nobody waits for this sequence any more")
            for row in segment.rows:
                batch.failures.setdefault(row, reason)

    def step(self) -> Step:
        """Compute the next tokens of every scheduled sequence, and take out those that have ended."""
        started = time.monotonic()
        clock = self.model.clock
        clock.start()
        ended = self.scheduler.reap()  # aborted or refused before they ran
        work = self.scheduler.schedule()
        prompt_tokens = sum(each.length for each in work if not each.sequence.generated)
        parts = self._parts(work)
        outputs = self._run(parts) if work else {}
        clock.mark("sample")
        for sequence in ended + self.scheduler.reap():
            outputs[sequence.id] = replace(
                outputs.get(sequence.id) or sequence.news(),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                failure=sequence.failure,
                last_replica=self._policy(sequence.stood_in) or None,
            )
        stats = replace(
            self.stats(),
            step_seconds=time.monotonic() - started,
            prompt_tokens=prompt_tokens,
            generated_tokens=sum(each.token is not None for each in outputs.values()),
            last_replica=self._policy(self._stood_in),
        )
        self._stood_in = 0
        if work:
            rows = sum(each.length for each in work)
            self.micro_batches.learn(rows, len(parts), stats)
            hop, rereading = self.micro_batches.weighed(rows)
            stats = replace(stats, micro_batches=len(parts), hop_seconds=hop, rereading_seconds=rereading)
        return Step(list(outputs.values()), stats)

    def stats(self) -> EngineStats:
        """The engine's state, and what its workers did since the last call."""
        store = self.scheduler.store
        queries, hits = store.take_queries()
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_tokens_used=store.used_tokens,
            kv_tokens_total=store.pool.total_tokens,
            preemptions=self.scheduler.take_preemptions(),
            prefix_queries=queries,
            prefix_hits=hits,
            prefix_evicted=store.prefixes.take_evicted(),
            prefix_tokens=store.kept_tokens,
            workers=self.dispatcher.take_stats(),
            stages=self.model.clock.take(),
            gate_policy=self.model.policy.take() if self.model.policy else {},
        )

    def _parts(self, work: list[Work]) -> list[list[Work]]:
        """The step's sequences, in as many batches as are worth it."""
        rows, same_host = sum(each.length for each in work), self.dispatcher.same_host
        count = self.micro_batches.choose(rows, len(work), same_host=same_host)
        if count == 1:
            return [work]
        return [[work[place] for place in part] for part in share_out([each.length for each in work], count)]

    def _run(self, parts: list[list[Work]]) -> dict[int, Output]:
        """One pass of the model, and the news of each sequence by its id."""
        batches = [self._batch(part) for part in parts]
        self.model.clock.mark("schedule")
        placed = [
            (each, batch, segment)
            for part, batch in zip(parts, batches, strict=True)
            for each, segment in zip(part, batch.segments, strict=True)
        ]
        self._current = {each.sequence.id: (batch, segment) for each, batch, segment in placed}
        try:
            found = self.mailbox.drive_all([self.model.forward(batch) for batch in batches])  # of each part [T, D]
        finally:
            self._current = {}
        hidden = found[0] if len(found) == 1 else torch.cat(found)
        outputs: dict[int, Output] = {}
        due: list[tuple[Sequence, int]] = []  # with the row that predicts the next token
        end = 0
        for each, batch, segment in placed:
            sequence, start, end = each.sequence, end, end + each.length
            if batch.stood_in:
                self._note(sequence, sum(batch.stood_in.get(row, 0) for row in segment.rows))
            failed = next((row for row in segment.rows if row in batch.failures), None)
            if failed is not None:
                if not sequence.finish_reason:  # else it was aborted
                    sequence.fail(batch.failures[failed])
                continue
            prompt_logprobs = self._prompt_logprobs(sequence, hidden[start:end])
            sequence.computed += each.length
            if prompt_logprobs is not None:
                outputs[sequence.id] = replace(sequence.news(), prompt_logprobs=prompt_logprobs)
            if not sequence.uncomputed and not sequence.finish_reason:
                due.append((sequence, end - 1))
        return outputs | self._choose(due, hidden, outputs)

    def _note(self, sequence: Sequence, rows: int) -> None:
        """So many rows of a sequence needed an expert that no worker held."""
        sequence.stood_in += rows
        self._stood_in += rows
        if rows and self.dispatcher.crew.config.last_replica == "renormalise":
            self.scheduler.store.distrust(sequence)  # another time its tokens have other keys and values

    def _policy(self, rows: int) -> dict[str, int]:
        """What was done for so many rows."""
        return {self.dispatcher.crew.config.last_replica: rows} if rows else {}

    def _batch(self, work: list[Work]) -> StepRows:
        tokens: list[int] = []
        segments: list[Segment] = []
        for each in work:
            start, cache = each.sequence.computed, each.sequence.cache
            if cache is None:
                raise AssertionError("a scheduled sequence has a cache")
            segments.append(Segment(cache, len(tokens), each.length, start))
            tokens += each.sequence.tokens[start : start + each.length]
        return self.model.batch(tokens, segments)

    def _choose(self, due: list[tuple[Sequence, int]], hidden: Tensor, outputs: dict[int, Output]) -> dict[int, Output]:
        """The next token of every sequence that is computed to its end."""
        due = [(sequence, row) for sequence, row in due if not _prefill_only(sequence)]
        if not due:
            return {}
        logits = self.model.logits(hidden[[row for _, row in due]])  # [S, V]
        chosen: dict[int, Output] = {}
        tokens = self.model.choose(logits, [sequence for sequence, _ in due], self.eos_token_ids)
        reports = _logprobs(logits, tokens, [sequence for sequence, _ in due])
        for row, ((sequence, _), token) in enumerate(zip(due, tokens, strict=True)):
            if token < 0:
                sequence.fail(ConsiliumError("the model gave numbers that are not finite; its weights may be damaged"))
                continue
            sequence.append(token, self.eos_token_ids)
            news = outputs.get(sequence.id) or sequence.news()
            stood_in = self._policy(sequence.stood_in) or None  # now, for a stop string may end it over there
            chosen[sequence.id] = replace(news, token=token, logprobs=reports.get(row), last_replica=stood_in)
        return chosen

    def _prompt_logprobs(self, sequence: Sequence, hidden: Tensor) -> list[TokenLogprobs] | None:
        """What a chunk's hidden states [n, D] say of the prompt tokens that follow them; None where not asked for."""
        count, start = sequence.sampling.prompt_logprobs, sequence.computed
        first = max(start, sequence.prompt_reported - 1)  # after a preemption some were reported before
        stop = min(start + len(hidden), sequence.prompt_length - 1)
        if count is None or first >= stop:
            return None
        reports: list[TokenLogprobs] = []
        for begin in range(first, stop, LOGIT_ROWS):
            end = min(begin + LOGIT_ROWS, stop)
            rows = torch.log_softmax(self.model.logits(hidden[begin - start : end - start]).cpu(), dim=-1)
            targets = sequence.tokens[begin + 1 : end + 1]
            reports += token_logprobs(rows, targets, [count] * len(targets))
        sequence.prompt_reported = stop + 1
        return reports


def _logprobs(logits: Tensor, tokens: list[int], sequences: list[Sequence]) -> dict[int, TokenLogprobs]:
    """What to report of each row of [S, V] that has a token and was asked about."""
    asked = {row: each.sampling.logprobs for row, each in enumerate(sequences) if tokens[row] >= 0}
    counts = {row: count for row, count in asked.items() if count is not None}
    if not counts:
        return {}
    rows = list(counts)
    logprobs = torch.log_softmax(logits[rows].cpu(), dim=-1)
    found = token_logprobs(logprobs, [tokens[row] for row in rows], list(counts.values()))
    return dict(zip(rows, found, strict=True))


def _prefill_only(sequence: Sequence) -> bool:
    """Whether no token was asked for; then it has ended."""
    if sequence.sampling.max_tokens == 0:
        sequence.finish_reason = "length"
    return sequence.sampling.max_tokens == 0
