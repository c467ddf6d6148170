"""How a student learns, with the defaults of the published default model."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.gates import GateOptions


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """One run of distillation."""

    steps: int
    batch: int  # blocks a step
    learning_rate: float = 3e-3  # of the adapters
    norm_rate: float = 5e-4
    gate_rate: float = 1e-5
    warmup: float = 0.03  # part of the steps in which the rate rises; then it falls to 0 along a cosine
    soft_until: float = 0.0  # part of the steps after which experts that are not chosen are quite off
    int8_from: float = 1.0  # part of the steps after which experts compute as the workers do
    temperature: float = 1.0
    divergence_weight: float = 1.0
    text_weight: float = 0.5  # of the cross-entropy
    clip: float = 1.0
    seed: int = 0
    report_every: int = 20
    gate: GateOptions = field(default_factory=lambda: GateOptions(top_k=1))
