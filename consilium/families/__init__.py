"""One module a family: its config mapping, its checkpoint names and its flags over shared blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from consilium.errors import CheckpointError
from consilium.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from consilium.families.names import ExpertLayout, Names
from consilium.families.refused import REFUSED
from consilium.model_config import ModelConfig, check

__all__ = ["SMOOTHED", "ExpertLayout", "Family", "Names", "find_family", "parse_config"]


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture writes its config.json and names its tensors."""

    parse: Callable[[Mapping[str, Any]], ModelConfig]
    names: Names


FAMILIES: dict[str, Family] = {
    "deepseek": Family(deepseek.parse, deepseek.NAMES),
    "deepseek_v2": Family(deepseek_v2.parse, deepseek_v2.NAMES),
    "deepseek_v3": Family(deepseek_v3.parse, deepseek_v3.NAMES),
    "ernie4_5_moe": Family(ernie4_5_moe.parse, ernie4_5_moe.NAMES),
    "glm4_moe": Family(glm4_moe.parse, glm4_moe.NAMES),
    "gpt_oss": Family(gpt_oss.parse, gpt_oss.NAMES),
    "granitemoe": Family(granitemoe.parse, granitemoe.NAMES),
    "minimax_m2": Family(minimax_m2.parse, minimax_m2.NAMES),
    "mixtral": Family(mixtral.parse, mixtral.NAMES),
    "olmoe": Family(olmoe.parse, olmoe.NAMES),
    "phimoe": Family(phimoe.parse, phimoe.NAMES),
    "qwen2_moe": Family(qwen2_moe.parse, qwen2_moe.NAMES),
    "qwen3_moe": Family(qwen3_moe.parse, qwen3_moe.NAMES),
}


# Of which it is known what `consilium quantize` may move where; in others it rounds the experts as they are.
SMOOTHED = ("mixtral", "qwen3_moe")


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that config.json's `model_type` names. Raises CheckpointError with the list of those supported."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else model_type
        reason = f", for {REFUSED[model_type]}" if isinstance(model_type, str) and model_type in REFUSED else ""
        raise CheckpointError(
            f"config.json: architecture {architecture!r} is not supported{reason}; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return family


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The checked shape of the model. Raises CheckpointError that names the key."""
    return check(find_family(config).parse(config))
