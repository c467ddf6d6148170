"""The loop: blocks in, a student that has learned from the teacher out.

At first all experts are on and the student is the teacher; those that are not chosen are then faded out, so that it
never has to recover from a shock. Letters: N blocks, L tokens of a block, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from training.gates import Gated, collapsed, moved_bias
from training.llama import Dense, dense_layer, hidden_states
from training.losses import Losses, distillation, gradient_of_hidden, next_tokens
from training.settings import DistillSettings
from training.student import Compute, Student, student_layer, student_states


class TrainingError(ConsiliumError):
    """Training cannot go on as it is set up."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a step looked like; divergence and cross-entropy in nats a position."""

    step: int
    divergence: float
    cross_entropy: float
    balance: float  # the balancing losses, weighed
    smallest_load: float  # of any expert, in even shares
    largest_load: float
    hard: float
    rate: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that a step spends its time in, compiled where that pays."""

    student: Compute = student_layer
    teacher: Callable[..., Tensor] = dense_layer
    losses: Callable[..., Losses] = distillation

    @classmethod
    def compiled(cls) -> Kernels:
        """By torch.compile: each once for all layers, since they are functions of tensors alone."""
        compile_: Any = partial(torch.compile, dynamic=False)
        return cls(compile_(student_layer), compile_(dense_layer), compile_(distillation))


class Distillation:
    """A run that can be taken up again after any step: its state is ``student``, ``optimizer`` and ``step``.

    ``load`` [layers, E] is the part of all choices that each expert got at the last report, ``first_step`` the one at
    which the optimizer started.
    """

    load: Tensor | None = None
    first_step = 0

    def __init__(
        self,
        student: Student,
        teacher: Dense,
        blocks: Tensor,
        settings: DistillSettings,
        kernels: Kernels | None = None,
    ) -> None:
        """``teacher`` has the dtype that is computed in; ``blocks`` [N, L] lie on its device."""
        self.student, self.settings, self.step = student, settings, 0
        self._teacher, self._blocks, self._kernels = teacher, blocks, kernels or Kernels()
        named = student.parameters()
        rates = {"norm": settings.norm_rate, "router": settings.gate_rate}
        groups = [
            {
                "params": [tensor],
                "rate": next((rates[end] for end in rates if name.endswith(end)), settings.learning_rate),
            }
            for name, tensor in named.items()
        ]
        fused = teacher.embed.is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self._dtype = teacher.embed.dtype

    def grown(self, student: Student) -> Distillation:
        """The same run with a student that has more experts; its optimizer starts anew."""
        run = Distillation(student, self._teacher, self._blocks, self.settings, self._kernels)
        run.step = run.first_step = self.step
        return run

    def run(self, until: int | None = None) -> Iterator[Report]:
        """The remaining steps, or those before ``until``.

        Raises TrainingError when the gate collapses or a loss is not finite.
        """
        every, last = self.settings.report_every, self.settings.steps if until is None else until
        start, since = time.perf_counter(), self.step
        while self.step < last:
            losses, gates = self._advance()
            self.step += 1
            if self.step % every == 0 or self.step == last:
                found = [float(each) for each in losses]  # waits for the device
                seconds, start = time.perf_counter() - start, time.perf_counter()
                tokens = (self.step - since) * self.settings.batch * self._blocks.shape[1]
                since = self.step
                yield self._report(found, gates, tokens / seconds)

    def hard(self) -> float:
        """How far the experts that are not chosen are faded out at this step: 0 to 1."""
        until = self.settings.soft_until * self.settings.steps
        return min(1.0, (self.step + 1) / until) if until else 1.0

    def _advance(self) -> tuple[Losses, list[Gated]]:
        settings = self.settings
        torch.manual_seed(settings.seed * 1_000_003 + self.step)  # the gate's noise, the same after an interruption
        tokens = self._blocks[self._rows()].long()
        with torch.no_grad():
            expected = hidden_states(self._teacher, tokens, self._kernels.teacher).flatten(0, 1)
        states, gates = student_states(
            self.student,
            tokens,
            torch.tensor(self.hard(), device=tokens.device),
            settings.gate,
            self._dtype,
            self._kernels.student,
            self.step >= settings.int8_from * settings.steps,
        )
        head, temperature, flat = self._teacher.embed, settings.temperature, states.flatten(0, 1)

        def weigh(losses: Losses) -> Tensor:
            total = settings.divergence_weight * losses.divergence + settings.text_weight * losses.cross_entropy
            return total / len(flat)

        def compute(mine: Tensor, theirs: Tensor, targets: Tensor) -> Losses:
            return self._kernels.losses(mine, theirs, targets, head, temperature)

        gradient, losses = gradient_of_hidden(flat, expected, next_tokens(tokens), weigh, compute)
        roots, gradients = [flat], [gradient]
        if gates and gates[0].loss.requires_grad:
            roots.append(torch.stack([each.loss for each in gates]).sum())
            gradients.append(torch.ones_like(roots[1]))
        torch.autograd.backward(roots, gradients)
        self._update(gates)
        return Losses(*(each / len(flat) for each in losses)), gates

    def _update(self, gates: list[Gated]) -> None:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self._schedule()
        parameters = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if settings.gate.bias_rate:
            for layer, gated in zip(self.student.layers, gates, strict=True):
                if layer.router is not None:
                    layer.router.bias.copy_(moved_bias(layer.router.bias, gated.load, settings.gate.bias_rate))

    def _schedule(self) -> float:
        settings, done = self.settings, self.step / self.settings.steps
        if done < settings.warmup:
            return (self.step + 1) / (settings.warmup * settings.steps)
        return 0.5 * (1 + math.cos(math.pi * (done - settings.warmup) / (1 - settings.warmup)))

    def _rows(self) -> Tensor:
        """The blocks of this step: every block once an epoch, each epoch in an order of its own."""
        count, batch, seed = len(self._blocks), self.settings.batch, self.settings.seed
        places = range(self.step * batch, (self.step + 1) * batch)
        chosen = [int(self._order(seed, place // count, count)[place % count]) for place in places]
        return torch.tensor(chosen, device=self._blocks.device)

    def _order(self, seed: int, epoch: int, count: int) -> Tensor:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1009 + epoch))
        return self._permutation

    def _report(self, losses: list[float], gates: list[Gated], speed: float) -> Report:
        if not all(map(math.isfinite, losses)):
            raise TrainingError(f"step {self.step}: a loss is not finite; start again with a lower learning_rate")
        balance, smallest, largest = 0.0, 1.0, 1.0
        if gates:
            self.load = load = torch.stack([each.load for each in gates])  # [layers, E]
            shares = load * load.shape[1]
            balance = float(torch.stack([each.loss.detach() for each in gates]).sum())
            smallest, largest = float(shares.min()), float(shares.max())
            self._check_gates(load)
        divergence, cross_entropy = losses
        schedule = (self.hard(), self._schedule())
        return Report(self.step, divergence, cross_entropy, balance, smallest, largest, *schedule, speed)

    def _check_gates(self, load: Tensor) -> None:
        layers = collapsed(load)
        if layers:
            raise TrainingError(
                f"step {self.step}: the gate of layer {layers[0]} collapsed: at least half of its experts get next to "
                "no tokens. Raise gate.aux_weight or set gate.bias_rate, and go on from an earlier checkpoint"
            )
