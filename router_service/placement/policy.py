"""What the operator wants of a placement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """Settings of the planner."""

    replicas: int = 1  # copies of every expert, at least, as far as there is room
    move_cost: float = 0.02  # of the mean level; what one move per worker must earn
    tolerance: float = 0.05  # of the mean level; a busiest worker with so little more is left alone
    gate_groups: int = 1  # of a gate that asks a few groups of neighbouring experts: each group stays on few hosts
