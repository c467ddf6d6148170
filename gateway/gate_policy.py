"""The serving policies of a deployment, applied to every routing, and what they changed since the last report."""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor

from consilium.config import AdaptiveK, GatewayConfig
from consilium.errors import ConfigError
from consilium.gate import Routing
from consilium.gate_policies import adaptive_k, limit_load
from consilium.model_config import ModelConfig


class GatePolicy:
    """Fewer experts for tokens that need few, then no expert with too many tokens."""

    def __init__(self, model: ModelConfig, adaptive: AdaptiveK | None, capacity_factor: float | None) -> None:
        """Raises ConfigError for what does not fit the model."""
        self._adaptive, self._capacity_factor = adaptive, capacity_factor
        self._most = model.top_k if adaptive is None or adaptive.max is None else adaptive.max
        if adaptive is not None and not adaptive.min <= self._most <= model.top_k:
            raise ConfigError(
                f"gateway.adaptive_k: min {adaptive.min} and max {self._most} must fit the model's {model.top_k} "
                "experts a token"
            )
        if capacity_factor is not None and model.gate.scores not in ("softmax", "sigmoid"):
            raise ConfigError(
                f"gateway.capacity_factor: the gate of {model.family} models scores only the experts that it chooses, "
                "so there is no next-best one; leave it out"
            )
        self._share = model.top_k / model.num_experts
        self._counts = Counter[str]()

    @property
    def needs_scores(self) -> bool:
        """Whether the scores of all experts matter."""
        return self._capacity_factor is not None

    def apply(self, routing: Routing, scores: Tensor | None) -> Routing:
        """``scores`` [T, E] where they are needed."""
        if self._adaptive is not None:
            routing = adaptive_k(routing, self._adaptive.mass, self._adaptive.min, self._most)
            if routing.kept is not None:
                self._counts["dropped"] += int((~routing.kept).sum())
        if self._capacity_factor is not None and scores is not None:
            most = math.ceil(self._capacity_factor * self._share * len(scores))
            limited = limit_load(routing, scores, most)
            self._counts["moved"] += limited.moved
            self._counts["over"] += limited.over
            routing = limited.routing
        return routing

    def take(self) -> dict[str, int]:
        """Pairs dropped, moved, and left where there was no room, since the last call."""
        counts, self._counts = dict(self._counts), Counter()
        return counts


def find_policy(gateway: GatewayConfig, model: ModelConfig) -> GatePolicy | None:
    """As configured; None where nothing is. Raises ConfigError."""
    if gateway.adaptive_k is None and gateway.capacity_factor is None:
        return None
    return GatePolicy(model, gateway.adaptive_k, gateway.capacity_factor)
