"""An engine over a model in this process, with its workers, and what it says of each sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from consilium.checkpoint import Checkpoint
from gateway.arithmetic import Arithmetic
from gateway.dispatcher import Dispatcher
from gateway.engine import Engine
from gateway.engine_model import EngineModel
from gateway.gate_policy import GatePolicy
from gateway.kv_cache import BLOCK, KVPool, Pool
from gateway.kv_store import KVStore
from gateway.mailbox import Mailbox
from gateway.messages import Abort, EngineStats, Failure, Generate, Output, SamplingParams, TokenLogprobs
from gateway.micro_batches import MicroBatches
from gateway.model import Model
from gateway.scheduler import Scheduler
from tests.local_workers import Compute, LocalWorker, local_dispatcher

VOCABULARY = 384
DAMAGED = 5  # a token that no prompt here has


@dataclass
class Story:
    """Everything the engine said of one sequence, put together."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    failure: Failure | None = None
    queue_seconds: list[float] = field(default_factory=list)

    def add(self, news: Output) -> None:
        assert self.finish_reason is None, "nothing comes after the end"
        if news.prompt_logprobs is not None:
            assert not self.tokens, "the prompt comes before what follows it"
            self.prompt_logprobs += news.prompt_logprobs
        if news.token is not None:
            self.tokens.append(news.token)
        if news.logprobs is not None:
            self.logprobs.append(news.logprobs)
        if news.queue_seconds is not None:
            self.queue_seconds.append(news.queue_seconds)
        self.finish_reason, self.failure = news.finish_reason, news.failure


class Served:
    """An engine with its workers, and what it has said so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: int = 100,
        step: int = 64,
        experts: Iterable[Iterable[int]] = ((0, 2), (1, 3)),
        *,
        prefix_cache: bool = True,
        micro_batches: int | None = 1,
        arithmetic: Arithmetic | None = None,
        compute: Compute | None = None,
        policy: GatePolicy | None = None,
    ) -> None:
        config = checkpoint.config
        arithmetic = arithmetic or Arithmetic(torch.float32)
        self.mailbox = Mailbox(self._handle)
        self.workers: list[LocalWorker]
        replies = arithmetic.dtype if arithmetic.experts is None else torch.bfloat16
        dispatcher, self.workers = local_dispatcher(checkpoint, self.mailbox, experts, compute, replies)
        self.meter = dispatcher.meter
        memory = blocks * BLOCK * config.cached_elements * arithmetic.dtype.itemsize
        model, pool = self.model_of(checkpoint, arithmetic, dispatcher, policy, memory)
        scheduler = Scheduler(KVStore(pool, prefix_cache=prefix_cache), 8, step)
        self.engine = Engine(
            model, scheduler, dispatcher, self.mailbox, config.eos_token_ids, MicroBatches.of(config, micro_batches)
        )
        self.stories: dict[int, Story] = {}
        self.stats: list[EngineStats] = []

    def model_of(
        self,
        checkpoint: Checkpoint,
        arithmetic: Arithmetic,
        dispatcher: Dispatcher,
        policy: GatePolicy | None,
        memory: int,
    ) -> tuple[EngineModel, Pool]:
        """What computes, with its pool of so many bytes for keys and values."""
        pool = KVPool(checkpoint.config, arithmetic.dtype, memory)
        return Model(checkpoint, arithmetic, dispatcher, dispatcher.clock, policy), pool

    def _handle(self, event: object) -> None:
        assert isinstance(event, Abort)
        self.engine.abort(event.id)

    def step(self) -> None:
        with torch.inference_mode():
            step = self.engine.step()
        self.stats.append(step.stats)
        assert len({each.id for each in step.outputs}) == len(step.outputs)
        for each in step.outputs:
            self.stories[each.id].add(each)

    def add(self, *requests: Generate) -> None:
        for request in requests:
            self.stories[request.id] = Story()
            self.engine.add(request)

    def run(self, *requests: Generate) -> dict[int, Story]:
        """Every story to its end; nothing may be left in the pool."""
        self.add(*requests)
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            self.step()
        assert all(story.finish_reason for story in self.stories.values())
        assert self.engine.stats().kv_tokens_used == 0
        return self.stories


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(DAMAGED + 1, VOCABULARY, (length,), generator=generator).tolist()


def greedy(number: int, tokens: list[int], new: int, **sampling: Any) -> Generate:
    return Generate(number, tokens, SamplingParams(new, temperature=0, ignore_eos=True, **sampling))


def assert_same(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    """To the last bit."""
    assert [each.token for each in found] == [each.token for each in expected]
    assert found == expected


def assert_same_story(found: Story, expected: Story) -> None:
    """Everything the client sees, but for how long it waited and what was found in the cache."""
    assert (found.finish_reason, found.failure) == (expected.finish_reason, expected.failure)
    assert found.tokens == expected.tokens
    assert_same(found.logprobs, expected.logprobs)
    assert_same(found.prompt_logprobs, expected.prompt_logprobs)
