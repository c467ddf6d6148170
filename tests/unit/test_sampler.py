"""Sampling of single rows: each parameter by what it must and must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.messages import Generate, SamplingParams
from gateway.sampler import sample, token_logprobs, uniform
from gateway.sequence import Sequence

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]))


def sequence(prompt: tuple[int, ...] = (0,), generated: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    started = Sequence.start(Generate(1, list(prompt), SamplingParams(**{"max_tokens": 1000, "seed": 1, **sampling})))
    for token in generated:
        started.append(token, ())
    return started


def drawn(count: int = 2000, **sampling: Any) -> list[float]:
    """How often each token is drawn over many positions of one seed."""
    running = sequence(**{"max_tokens": count + 1, **sampling})
    counts = [0] * 5
    for _ in range(count):
        token = sample(LOGITS, running, ())
        counts[token] += 1
        running.append(token, ())
    return [each / count for each in counts]


def test_draws_follow_the_distribution() -> None:
    assert drawn() == pytest.approx([0.4, 0.3, 0.2, 0.07, 0.03], abs=0.03)


def test_temperature_flattens_and_zero_is_greedy() -> None:
    assert drawn(temperature=0.5) == pytest.approx(
        [0.16 / 0.2958, 0.09 / 0.2958, 0.04 / 0.2958, 0.017, 0.003], abs=0.03
    )
    assert drawn(10, temperature=0.0) == [1, 0, 0, 0, 0]


def test_top_k_top_p_min_p() -> None:
    assert drawn(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=0.04)
    assert drawn(top_p=0.69) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=0.04)
    assert drawn(top_p=0.71) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0, 0], abs=0.04)
    assert drawn(min_p=0.45) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0, 0], abs=0.04)
    assert drawn(top_p=1e-6) == [1, 0, 0, 0, 0]


def test_seed_choice_and_position_alone_decide() -> None:
    assert uniform(5, 0, 3) == uniform(5, 0, 3)
    assert (
        len({uniform(seed, choice, position) for seed in (0, 2**63 - 1) for choice in (0, 1) for position in (0, 1)})
        == 8
    )


def test_bias_forces_and_forbids() -> None:
    assert sample(LOGITS, sequence(temperature=0.0, logit_bias={3: 100.0}), ()) == 3
    assert sample(LOGITS, sequence(temperature=0.0, logit_bias={0: -100.0}), ()) == 1


def test_penalties() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    # Presence and frequency count what was generated, not the prompt.
    assert sample(logits, sequence((0, 0), temperature=0.0, presence_penalty=1.0), ()) == 0
    assert sample(logits, sequence((0,), (0,), temperature=0.0, presence_penalty=0.2), ()) == 1
    assert sample(logits, sequence((0,), (0, 0), temperature=0.0, frequency_penalty=0.04), ()) == 0
    assert sample(logits, sequence((0,), (0, 0, 0), temperature=0.0, frequency_penalty=0.04), ()) == 1
    # Repetition divides what is positive and multiplies what is negative, in the prompt too.
    assert sample(logits, sequence((0,), temperature=0.0, repetition_penalty=1.1), ()) == 1
    assert sample(torch.tensor([-1.0, -1.05]), sequence((0,), temperature=0.0, repetition_penalty=1.1), ()) == 1


def test_min_tokens_holds_the_end_back() -> None:
    waiting = sequence(temperature=0.0, min_tokens=1, stop_token_ids=(1,))
    assert sample(LOGITS, waiting, (0,)) == 2
    waiting.append(2, (0,))
    assert sample(LOGITS, waiting, (0,)) == 0


def test_logits_are_not_changed() -> None:
    logits = LOGITS.clone()
    sample(logits, sequence(logit_bias={1: 5.0}, top_p=0.5, repetition_penalty=2.0), ())
    assert torch.equal(logits, LOGITS)


@given(st.lists(st.sampled_from([-3.0, -1.0, -1.0, 0.0]), min_size=3, max_size=12), st.integers(0, 3))
def test_likeliest_tokens_break_ties_by_id(values: list[float], count: int) -> None:
    report = token_logprobs(torch.tensor(values), 1, count)
    assert report.logprob == values[1]
    assert report.top_tokens == sorted(range(len(values)), key=lambda token: (-values[token], token))[:count]
    assert report.top_logprobs == [values[token] for token in report.top_tokens]
