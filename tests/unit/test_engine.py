"""The engine over a tiny model in this process: what becomes of sequences that share memory, steps and faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.config import GatewayConfig
from consilium.errors import ExpertUnavailable
from consilium.frames import Frame
from gateway.kv_cache import BLOCK
from gateway.messages import Abort
from tests.tiny_models import save_mixtral
from tests.unit.served_engine import DAMAGED, Served, assert_same, greedy, prompt

LAYERS, TOP_K = 3, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A sound checkpoint whose embedding goes bad in memory: one that is bad on disk is refused."""

    class Damaged(Checkpoint):
        def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
            whole = super().tensor(name, shape)
            if name == self.names.embed:
                whole = whole.clone()
                whole[DAMAGED] = torch.nan
            return whole

    return Damaged(save_mixtral(tmp_path_factory.mktemp("damaged")))


@pytest.mark.parametrize("step", [64, 7])
@pytest.mark.parametrize("prompt_logprobs", [None, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_who_gives_way_says_the_same_in_the_end(
    checkpoint: Checkpoint, step: int, prompt_logprobs: int | None, keep: bool
) -> None:
    lengths = {1: 13, 2: 13, 3: 33}
    requests = [
        greedy(number, prompt(length, number), 10, logprobs=3, prompt_logprobs=prompt_logprobs)
        for number, length in lengths.items()
    ]
    small = Served(checkpoint, blocks=6, step=step, prefix_cache=keep)
    large = Served(checkpoint, step=step, prefix_cache=keep)
    found, expected = small.run(*requests), large.run(*requests)
    assert sum(each.preemptions for each in large.stats) == 0
    assert sum(each.preemptions for each in small.stats) > 0
    if step == 7 and not keep:  # somebody had to give way in the middle of its prompt
        assert sum(each.prompt_tokens for each in small.stats) > sum(lengths.values())
    for request in requests:
        ours, theirs = found[request.id], expected[request.id]
        assert ours.finish_reason == theirs.finish_reason == "length"
        assert ours.tokens == theirs.tokens
        assert len(ours.tokens) == 10
        assert [each.token for each in ours.logprobs] == ours.tokens
        assert_same(ours.logprobs, theirs.logprobs)
        assert [each.token for each in ours.prompt_logprobs] == (request.prompt[1:] if prompt_logprobs else [])
        assert_same(ours.prompt_logprobs, theirs.prompt_logprobs)
        assert len(ours.queue_seconds) == 1


@pytest.mark.parametrize("step", [1, 8])
def test_a_prompt_longer_than_a_step_is_read_in_parts(checkpoint: Checkpoint, step: int) -> None:
    request = greedy(1, prompt(30, seed=1), 4, logprobs=2, prompt_logprobs=1)
    served = Served(checkpoint, step=step)
    found, expected = served.run(request)[1], Served(checkpoint).run(request)[1]
    assert found.tokens == expected.tokens
    assert_same(found.logprobs, expected.logprobs)
    assert_same(found.prompt_logprobs, expected.prompt_logprobs)
    parts = [min(step, 30 - start) for start in range(0, 30, step)]
    assert [each.prompt_tokens for each in served.stats] == [*parts, 0, 0, 0]
    assert [each.generated_tokens for each in served.stats] == [*(0 for _ in parts[1:]), 1, 1, 1, 1]


def test_a_long_prompt_delays_nobody(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint, step=8)
    served.add(greedy(1, prompt(5, seed=1), 12))
    served.step()
    served.add(greedy(2, prompt(60, seed=2), 2))
    for tokens in range(2, 8):
        served.step()
        assert len(served.stories[1].tokens) == tokens
        assert not served.stories[2].tokens
    alone = Served(checkpoint).run(greedy(2, prompt(60, seed=2), 2))
    assert served.run()[2].tokens == alone[2].tokens


@pytest.mark.parametrize("prompt_logprobs", [None, 0, 3])
def test_no_tokens_asked_for(checkpoint: Checkpoint, prompt_logprobs: int | None) -> None:
    tokens = prompt(20, seed=1)
    served = Served(checkpoint, step=8)
    story = served.run(greedy(1, tokens, 0, logprobs=1, prompt_logprobs=prompt_logprobs))[1]
    assert (story.finish_reason, story.tokens, story.logprobs, story.failure) == ("length", [], [], None)
    assert [each.token for each in story.prompt_logprobs] == ([] if prompt_logprobs is None else tokens[1:])
    assert all(len(each.top_tokens) == prompt_logprobs for each in story.prompt_logprobs)
    assert sum(each.generated_tokens for each in served.stats) == 0
    assert sum(each.prompt_tokens for each in served.stats) == 20


@pytest.mark.parametrize("between_layers", [False, True])
def test_an_abort_ends_one_sequence_and_no_other(checkpoint: Checkpoint, between_layers: bool) -> None:
    kept, dropped = greedy(1, prompt(9, seed=1), 8), greedy(2, prompt(9, seed=2), 8)
    alone = {each.id: Served(checkpoint).run(each)[each.id].tokens for each in (kept, dropped)}
    served = Served(checkpoint)
    served.add(kept, dropped)
    for _ in range(3):
        served.step()
    if between_layers:  # it comes while the engine waits for the second layer's experts

        def interrupt(frame: Frame) -> None:
            if frame.layer == 1:
                served.mailbox.post(Abort(2))

        served.workers[0].misbehave = served.workers[1].misbehave = interrupt
    else:
        served.engine.abort(2)
    used = served.engine.stats().kv_tokens_used
    served.step()
    assert served.stories[2].finish_reason == "abort"
    assert served.stories[2].tokens == alone[2][:3]
    assert served.engine.stats().kv_tokens_used < used
    stories = served.run()
    assert (stories[1].tokens, stories[1].finish_reason) == (alone[1], "length")


def test_numbers_that_are_not_finite_fail_only_their_sequence(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [greedy(number, prompt(6, number), 4) for number in (1, 2, 3)]
    alone = {each.id: Served(checkpoint).run(each)[each.id].tokens for each in requests}
    served = Served(checkpoint)
    logits = served.engine.model.logits

    def damaged_logits(hidden: Tensor) -> Tensor:
        rows = logits(hidden)
        if len(served.stats) == 2:  # in the third step, one of the 384 of sequence 2
            rows[1, 7] = torch.inf
        return rows

    monkeypatch.setattr(served.engine.model, "logits", damaged_logits)
    stories = served.run(*requests)
    assert stories[2].finish_reason == "error"
    assert stories[2].failure is not None
    assert "not finite; its weights may be damaged" in stories[2].failure.message
    assert stories[2].tokens == alone[2][:2]
    assert [(stories[each].tokens, stories[each].finish_reason) for each in (1, 3)] == [
        (alone[1], "length"),
        (alone[3], "length"),
    ]


def test_a_damaged_weight_fails_only_who_meets_it(damaged: Checkpoint) -> None:
    sound, bad = greedy(1, prompt(12, seed=1), 4), greedy(2, [*prompt(5, seed=2), DAMAGED, *prompt(5, seed=3)], 4)
    alone = Served(damaged).run(sound)
    stories = Served(damaged).run(bad, sound)
    assert (stories[1].tokens, stories[1].finish_reason) == (alone[1].tokens, "length")
    assert stories[2].failure is not None
    assert "not finite" in stories[2].failure.message
    assert not stories[2].tokens


def test_a_failing_expert_fails_only_who_needs_it(checkpoint: Checkpoint) -> None:
    requests = [greedy(number, prompt(2, number), 1) for number in range(12)]
    alone: dict[int, list[int]] = {}
    need: set[int] = set()
    for request in requests:
        served = Served(checkpoint, experts=[[0, 1, 2], [3]])
        alone[request.id] = served.run(request)[request.id].tokens
        if any(frame.layer == 1 for frame in served.workers[1].frames):
            need.add(request.id)
    assert need
    assert len(need) < len(requests)

    served = Served(checkpoint, experts=[[0, 1, 2], [3]])
    served.workers[1].misbehave = lambda frame: ExpertUnavailable("it is tired") if frame.layer == 1 else None
    stories = served.run(*requests)
    assert {number for number, story in stories.items() if story.finish_reason == "error"} == need
    for number, story in stories.items():
        if number in need:
            assert story.failure is not None
            assert story.failure.error == "ExpertUnavailable"
            assert story.failure.message.startswith("expert 3 of layer 1 is unavailable: ")
            assert story.failure.message.endswith("it is tired")
            assert not story.tokens
        else:
            assert (story.tokens, story.finish_reason) == (alone[number], "length")
    failures = {each.address: 0 for each in served.workers}
    for stats in served.stats:
        for each in stats.workers:
            failures[each.address] += each.failures
    assert failures["worker-0:1"] == 0
    assert failures["worker-1:1"] > 0


def test_without_workers_every_sequence_fails_and_the_engine_goes_on(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint, experts=[[0], [1]])
    stories = served.run(greedy(1, prompt(20, seed=1), 4), greedy(2, prompt(20, seed=2), 4))
    for story in stories.values():
        assert story.failure is not None
        assert story.failure.message.endswith("is unavailable: no worker that holds it is connected")
        assert not story.tokens
    complete = Served(checkpoint)
    served.engine.dispatcher.follow(complete.engine.dispatcher.placement, served.engine.dispatcher.workers)
    served.workers[0].address, served.workers[1].address = "worker-0:1", "worker-1:1"
    request = greedy(3, prompt(9, seed=3), 4)
    assert served.run(request)[3].tokens == complete.run(request)[3].tokens


def test_every_token_says_how_often_nobody_held_an_expert(checkpoint: Checkpoint) -> None:
    """Also before the end: a stop string ends a choice in the HTTP process."""
    served = Served(checkpoint, experts=[[0]])
    served.engine.dispatcher.crew.config = GatewayConfig(layer_timeout=10, audit=0, last_replica="local")
    served.add(greedy(1, prompt(9, seed=1), 4))
    counts: list[int] = []
    with torch.inference_mode():
        while served.engine.has_work:
            counts += [(each.last_replica or {}).get("local", 0) for each in served.engine.step().outputs]
    assert len(counts) == 4
    assert counts == sorted(set(counts))
    assert counts[0] > 0


def test_what_can_never_fit_fails_before_it_runs(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint, blocks=2)
    stories = served.run(greedy(1, prompt(2 * BLOCK, seed=1), 1), greedy(2, prompt(5, seed=2), 3))
    assert stories[1].failure is not None
    assert stories[1].failure.error == "InvalidRequest"
    assert "gateway.kv_cache_memory" in stories[1].failure.message
    assert len(stories[2].tokens) == 3


def test_the_end_token_ends_a_sequence_unless_it_is_ignored(checkpoint: Checkpoint) -> None:
    request = greedy(1, prompt(9, seed=4), 8)
    full = Served(checkpoint).run(request)[1].tokens
    served = Served(checkpoint)
    served.engine = replace(served.engine, eos_token_ids=(full[2],))
    stops = greedy(1, request.prompt, 8)
    stops = replace(stops, sampling=replace(stops.sampling, ignore_eos=False))
    story = served.run(stops, greedy(2, request.prompt, 8))
    end = full.index(full[2]) + 1
    assert (story[1].tokens, story[1].finish_reason) == (full[:end], "stop")
    assert (story[2].tokens, story[2].finish_reason) == (full, "length")


def test_the_statistics_add_up(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint, step=16)
    lengths = (5, 12, 30)
    stories = served.run(*(greedy(number, prompt(length, number), 3) for number, length in enumerate(lengths)))
    stats = served.stats
    assert sum(each.prompt_tokens for each in stats) == sum(lengths)
    assert sum(each.generated_tokens for each in stats) == sum(len(story.tokens) for story in stories.values()) == 9
    assert all(each.step_seconds > 0 for each in stats)
    assert (stats[0].running, stats[0].waiting) == (2, 1)
    assert (stats[0].kv_tokens_used, stats[0].kv_tokens_total) == (2 * BLOCK, 100 * BLOCK)
    assert (stats[-1].running, stats[-1].waiting, stats[-1].kv_tokens_used) == (0, 0, 0)
    assert [len(story.queue_seconds) for story in stories.values()] == [1, 1, 1]
    assert all(min(story.queue_seconds) >= 0 for story in stories.values())
    workers = [each for step in stats for each in step.workers]
    computed = sum(lengths) + 9 - len(lengths)  # nobody computes the last token
    assert sum(each.rows for each in workers) == computed * LAYERS * TOP_K
    assert sum(each.frames for each in workers) == sum(len(each.frames) for each in served.workers)
    assert sum(sum(each.expert_calls) for each in workers) == sum(
        len(frame.experts) for each in served.workers for frame in each.frames
    )
    assert sum(each.failures + each.failovers for each in workers) == 0
    assert served.engine.stats().workers == []
