"""Sampling of single rows: each parameter by what it must and must not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from consilium.kernels import sampling
from consilium.kernels.sharing import board_bytes
from gateway.messages import Generate, SamplingParams
from gateway.sampler import choose, token_logprobs, uniform
from gateway.sequence import Sequence

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03]))


def sequence(prompt: tuple[int, ...] = (0,), generated: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    started = Sequence.start(Generate(1, list(prompt), SamplingParams(**{"max_tokens": 1000, "seed": 1, **sampling})))
    for token in generated:
        started.append(token, ())
    return started


def sample(logits: Tensor, running: Sequence, eos_token_ids: tuple[int, ...] = ()) -> int:
    """The token of one sequence alone."""
    return choose(logits[None], [running], eos_token_ids)[0]


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
    report = token_logprobs(torch.tensor([values]), [1], [count])[0]
    assert report.logprob == values[1]
    assert report.top_tokens == sorted(range(len(values)), key=lambda token: (-values[token], token))[:count]
    assert report.top_logprobs == [values[token] for token in report.top_tokens]


# -- against the definition, and against other rows in the batch -----------------------------------------------------

SIZE = 1200  # more than two blocks of the kernel's sums, and a rest
settings_of_a_row = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 7, 700, SIZE, 5000]),
        "top_p": st.sampled_from([1.0, 1.0, 1e-6, 0.5, 0.9, 0.999999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {}, {5: 3.0}]),
        "min_tokens": st.sampled_from([0, 3]),
    }
)


def kept(logits: Tensor, running: Sequence) -> Tensor:
    """In float64, the probabilities [V] of what min_p, top_k and top_p leave."""
    sampling = running.sampling
    p = torch.softmax((logits.double() - logits.max()) / sampling.temperature, dim=-1)
    p = p.masked_fill(p < sampling.min_p * p.max(), 0)
    order = torch.sort(p, descending=True, stable=True).indices
    if 0 < sampling.top_k < len(p):
        p[order[sampling.top_k :]] = 0
    ranked = p[order] / p.sum()
    before = ranked.cumsum(-1) - ranked
    # On the border of top_p rounding decides.
    assume(sampling.top_p == 1 or float((before - sampling.top_p).abs().min()) > 1e-5)
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


@given(settings_of_a_row, st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 100))
def test_a_draw_is_as_defined(asked: dict[str, Any], spread: float, generator_seed: int) -> None:
    plain = {**asked, "temperature": max(asked["temperature"], 0.3), "repetition_penalty": 1.0}
    running = sequence(**{**plain, "logit_bias": {}, "min_tokens": 0})
    generator = torch.Generator().manual_seed(generator_seed)
    logits = (spread * torch.randn(SIZE, generator=generator)).round(decimals=1)  # some of them equal
    token, p = sample(logits, running), kept(logits, running)
    number = uniform(asked["seed"], 0, 0)
    below, reached = float(p[:token].sum()), float(p[: token + 1].sum())
    # Exponentials in float32 against float64: near a border the neighbour is as right.
    assert p[token] > 0
    assert below - 1e-5 <= number <= reached + 1e-5


@given(st.lists(settings_of_a_row, min_size=1, max_size=6), st.integers(0, 100))
def test_a_row_is_alone_in_the_batch(rows: list[dict[str, Any]], seed: int) -> None:
    logits = torch.randn(len(rows), SIZE, generator=torch.Generator().manual_seed(seed)) * 4
    running = [sequence((3, 4), (5,), **each) for each in rows]
    together = choose(logits, running, (0, 1))
    assert together == [sample(own, each, (0, 1)) for own, each in zip(logits, running, strict=True)]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 16, SIZE - 1])
def test_a_row_that_is_not_finite_has_no_token(odd: float, place: int) -> None:
    logits = torch.randn(3, SIZE)
    logits[1, place] = odd
    expected = logits.argmax(dim=1).tolist()
    assert choose(logits, [sequence(temperature=0.0)] * 3, ()) == [expected[0], -1, expected[2]]


@given(st.lists(st.sampled_from([-2.0, 0.0, -0.0, 1.0, 1.0]), min_size=1, max_size=700))
def test_greedy_takes_the_lowest_of_equal_ids(values: list[float]) -> None:
    assert sample(torch.tensor(values), sequence(temperature=0.0)) == values.index(max(values))


@pytest.mark.parametrize("size", [1, 17, 513, 5000])
def test_every_token_of_a_flat_row_is_drawn_in_its_turn(size: int) -> None:
    """The kernel's sum by blocks, at both ends of each of them."""
    row, table = torch.zeros(1, size), np.array([[1, 0, 1]], np.float32)
    for token in {0, size // 2, size - 1, *range(511, size, 512), *range(512, size, 512)}:
        found, board = np.zeros(1, np.int64), np.zeros(board_bytes(1, 1), np.uint8)
        numbers = np.array([(token + 0.5) / size])
        everything = np.array([size])
        places, sharer = np.array([row.data_ptr()]), (board.ctypes.data, 0, 1)
        sampling.draw(places, size, table, everything, numbers, found.ctypes.data, sharer)
        assert found.tolist() == [token]
