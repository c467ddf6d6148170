"""Reuse changes nothing but the work: the prefix cache off, cold, warm or short of memory, in chunks of any size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.checkpoint import Checkpoint
from consilium.errors import ExpertUnavailable
from consilium.frames import Frame
from gateway.messages import Abort, Generate
from tests.tiny_models import save_mixtral
from tests.unit.served_engine import Served, Story, assert_same_story, greedy, prompt

LAYERS, TOP_K = 3, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@dataclass(frozen=True)
class Ask:
    """A request for a prompt out of a common beginning and an end of its own."""

    common: int
    own: int
    new: int
    prompt_logprobs: int | None

    def request(self, number: int) -> Generate:
        tokens = prompt(50, seed=1)[: self.common] + prompt(self.own, seed=2 + self.own)
        return greedy(number, tokens, self.new, logprobs=2, prompt_logprobs=self.prompt_logprobs)


ASKS = st.builds(
    Ask,
    common=st.integers(1, 50),
    own=st.integers(0, 20),
    new=st.integers(0, 8),
    prompt_logprobs=st.sampled_from([None, None, 1]),
)


def test_with_and_without_reuse(checkpoint: Checkpoint) -> None:
    @cache
    def alone(ask: Ask) -> Story:
        return Served(checkpoint, prefix_cache=False).run(ask.request(0))[0]

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.lists(ASKS, min_size=1, max_size=4), min_size=1, max_size=3),
        st.sampled_from([1, 3, 16, 17, 64, 512]),
        st.integers(5, 30),
        st.booleans(),
    )
    def check(waves: list[list[Ask]], step: int, blocks: int, prefix_cache: bool) -> None:
        served = Served(checkpoint, blocks=blocks, step=step, prefix_cache=prefix_cache)
        asks = [ask for wave in waves for ask in wave]
        number = 0
        for wave in waves:  # each finds what those before have left
            requests = [ask.request(number + place) for place, ask in enumerate(wave)]
            number += len(wave)
            served.run(*requests)
        for each, ask in enumerate(asks):
            assert_same_story(served.stories[each], alone(ask))

    check()


def test_a_warm_cache_leaves_one_token_to_compute(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint)
    tokens = prompt(40, seed=1)
    first = served.run(greedy(1, tokens, 5, logprobs=2))[1]
    begun = len(served.stats)
    again = served.run(greedy(2, tokens, 5, logprobs=2))[2]
    assert_same_story(again, first)
    assert [each.prompt_tokens for each in served.stats[begun:]] == [1, 0, 0, 0, 0]
    assert sum(each.prefix_queries for each in served.stats) == 80
    assert sum(each.prefix_hits for each in served.stats) == 39
    assert served.stats[-1].prefix_tokens == 48  # 44 computed, in whole blocks, and once


def test_a_conversation_goes_on_where_it_was(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint)
    turn = prompt(20, seed=1)
    for number in range(4):
        expected = Served(checkpoint, prefix_cache=False).run(greedy(0, turn, 6))[0]
        begun = len(served.stats)
        story = served.run(greedy(number, turn, 6))[number]
        assert_same_story(story, expected)
        computed = sum(each.prompt_tokens for each in served.stats[begun:])
        assert computed == (20 if number == 0 else 11)  # the last answer's last token, and what is new
        turn = turn + story.tokens + prompt(10, seed=2 + number)


def test_a_failed_sequence_leaves_nothing_behind(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint)
    request = greedy(1, prompt(40, seed=1), 8)
    served.add(request)
    served.step()
    served.workers[0].misbehave = lambda _: ExpertUnavailable("it is tired")
    served.step()
    assert served.stories[1].finish_reason == "error"
    assert served.stats[-1].prefix_tokens == 0


def pairs(served: Served) -> list[int]:
    """(token, expert) pairs that were sent for each layer."""
    sent = [0] * LAYERS
    for worker in served.workers:
        for frame in worker.frames:
            sent[frame.layer] += frame.offsets[-1]
        worker.frames.clear()
    return sent


@pytest.mark.parametrize("everybody", [False, True])
def test_what_nobody_waits_for_goes_no_further_than_its_layer(checkpoint: Checkpoint, everybody: bool) -> None:
    served = Served(checkpoint, prefix_cache=False)
    served.add(greedy(1, prompt(9, seed=1), 4), greedy(2, prompt(20, seed=2), 4))

    def leave(frame: Frame) -> None:
        if frame.layer == 0:
            for number in (1, 2) if everybody else (2,):
                served.mailbox.post(Abort(number))

    served.workers[0].misbehave = leave
    served.step()
    rows = [29, 0, 0] if everybody else [29, 9, 9]
    assert pairs(served) == [TOP_K * each for each in rows]
    assert served.stories[2].finish_reason == "abort"
    assert served.stats[-1].kv_tokens_used == (0 if everybody else 16)
    if not everybody:
        alone = Served(checkpoint).run(greedy(1, prompt(9, seed=1), 4))[1]
        assert_same_story(served.run()[1], alone)


def test_a_sequence_that_has_failed_goes_no_further_with_any_of_its_rows(checkpoint: Checkpoint) -> None:
    served = Served(checkpoint, experts=[[0, 1, 2], [3]])
    served.workers[1].misbehave = lambda frame: ExpertUnavailable("it is tired") if frame.layer == 0 else None
    served.add(*(greedy(number, prompt(2, number), 1) for number in range(8)))
    served.step()
    failed = sum(story.finish_reason == "error" for story in served.stories.values())
    assert 0 < failed < 8
    sent = pairs(served)
    assert sent[1] == sent[2] == TOP_K * 2 * (8 - failed)
