from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConfigError
from expert_service.selection import parse_selection, select_experts, select_layers
from tests.unit.model_configs import tiny_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("3", [3]),
        ("0-3,7", [0, 1, 2, 3, 7]),
        (" 5 , 1-2 ", [1, 2, 5]),
        ("2-4,3-5,3", [2, 3, 4, 5]),
        ("6-6", [6]),
    ],
)
def test_selections(text: str, expected: list[int]) -> None:
    assert parse_selection(text, "worker.experts", 8) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "1,,2", "all,1", "1.5", "²", "0x1"])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match=r"worker\.layers: .* write all, or for example 0-3,7"):
        parse_selection(text, "worker.layers", 8)


@pytest.mark.parametrize("text", ["8", "0-8", "5-3", "99999999999999999999"])
def test_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r"worker\.layers: .* the model has 0-7"):
        parse_selection(text, "worker.layers", 8)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_any_set_can_be_written(numbers: set[int]) -> None:
    assert parse_selection(",".join(map(str, numbers)), "worker.experts", 41) == sorted(numbers)


def test_dense_layers_are_left_out() -> None:
    config = tiny_config(num_layers=5, moe_layers=(False, True, True, False, True))
    assert select_layers("all", config) == [1, 2, 4]
    assert select_layers("0-2", config) == [1, 2]
    with pytest.raises(ConfigError, match=r"none of 0,3 has experts; layers that have: \[1, 2, 4\]"):
        select_layers("0,3", config)


def test_experts_of_the_model() -> None:
    assert select_experts("all", tiny_config(num_experts=5)) == [0, 1, 2, 3, 4]
