"""Which worker shall hold which experts: pure functions of who is there, what is held, and what was asked for."""

from router_service.placement.plan import Demand, Move, Plan, WorkerSpec, levels, place
from router_service.placement.policy import Policy

__all__ = ["Demand", "Move", "Plan", "Policy", "WorkerSpec", "levels", "place"]
