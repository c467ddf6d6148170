"""Workers without processes: the dispatcher's protocol over the reference arithmetic, for tests of everything above."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint, ExpertTensors
from consilium.config import GatewayConfig, Quantization
from consilium.float_experts import FloatArithmetic
from consilium.frames import Frame, decode_result, encode_result
from gateway.batches import ExpertOutputs
from gateway.dispatcher import Dispatcher
from gateway.expert_meter import ExpertMeter
from gateway.local_experts import LocalExperts
from gateway.mailbox import Completion, Mailbox
from gateway.placement import build_placement
from gateway.worker import Reply


def reference_rows(checkpoint: Checkpoint, frame: Frame) -> Tensor:
    """What a float32 worker answers to ``frame``: [P, D], written as plainly as it can be."""
    rows = []
    for position, expert in enumerate(frame.experts):
        tensors = checkpoint.expert(frame.layer, expert)
        indices = frame.indices[frame.offsets[position] : frame.offsets[position + 1]].long()
        # Row by row: torch's product of several rows depends on how many there are.
        rows += [reference_row(tensors, x) for x in frame.rows[indices].split(1)]
    return torch.cat(rows)


def reference_row(tensors: ExpertTensors, x: Tensor) -> Tensor:
    """One row [1, D] through one expert."""
    gate, up, down = (each.float() for each in tensors.floats())
    biases = [each.float() for each in tensors.biases] if tensors.biases else [torch.zeros(())] * 3
    gated, upped = x @ gate.T + biases[0], x @ up.T + biases[1]
    if tensors.activation is None:
        return (nn.silu(gated) * upped) @ down.T + biases[2]
    limit = tensors.activation.limit
    gated, upped = gated.clamp(max=limit), upped.clamp(-limit, limit)
    return (gated * (gated * tensors.activation.alpha).sigmoid() * (upped + 1)) @ down.T + biases[2]


def outputs_of(rows: Tensor) -> ExpertOutputs:
    """Outputs with these rows [T * K, D] in their places."""
    outputs = ExpertOutputs(len(rows), rows.shape[1], rows.dtype)
    outputs.place(rows, np.arange(len(rows)))
    return outputs


def rows_of(outputs: ExpertOutputs) -> Tensor:
    """All rows [T * K, D]; the outputs are released."""
    rows = outputs.rows(np.arange(len(outputs.addresses)))
    outputs.release()
    return rows


Compute = Callable[[Frame], Tensor]  # output rows [P, D] of a frame


class IntegerRows:
    """What an int8 or int4 worker answers: the arithmetic of the expert service, with every expert at hand."""

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization = "int8") -> None:
        config = checkpoint.config
        self._arithmetic = find_arithmetic(quantization, "bfloat16", config.hidden_size, config.expert_size)
        self._experts = {
            (layer, expert): self._arithmetic.prepare(checkpoint.expert(layer, expert))
            for layer in config.expert_layers()
            for expert in range(config.num_experts)
        }

    def __call__(self, frame: Frame) -> Tensor:
        assert frame.scales is not None
        experts = [self._experts[frame.layer, expert] for expert in frame.experts]
        return self._arithmetic.compute(experts, frame.offsets, frame.rows, frame.scales, indices=frame.indices)


@dataclass
class LocalWorker:
    """Answers at once, or with what ``misbehave`` raises."""

    address: str
    compute: Compute
    mailbox: Mailbox
    group: str = "experts"
    identity: str = "1"
    numerics_class: str = "reference"
    local_link: bool = False
    frames: list[Frame] = field(default_factory=list)
    misbehave: Callable[[Frame], Exception | None] = lambda _: None
    spoil: Callable[[Tensor], Tensor] = lambda rows: rows
    silent: bool = False  # answers only when :meth:`wake` is called
    released: int = 0  # answers whose memory was given back
    withdrawn: int = 0  # frames that nobody waited for any more
    _unanswered: list[Callable[[], None]] = field(default_factory=list)

    def time_limit(self, pairs: int) -> float:  # noqa: ARG002 (the protocol's)
        return 10.0

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        completion: Completion[Reply] = Completion(deadline, lambda: None, self._withdraw)
        self.frames.append(frame)
        if self.silent:
            self._unanswered.append(partial(self._answer, frame, completion))
        else:
            self._answer(frame, completion)
        return completion

    def wake(self) -> None:
        """Answer what it was asked meanwhile, and go on."""
        self.silent = False
        unanswered, self._unanswered = self._unanswered, []
        for answer in unanswered:
            answer()

    def _answer(self, frame: Frame, completion: Completion[Reply]) -> None:
        error = self.misbehave(frame)
        if error is not None:
            self.mailbox.settle(completion, error)
        else:
            rows = partial(decode_result, encode_result(self.spoil(self.compute(frame)), 0, 0))
            self.mailbox.settle(completion, Reply(rows, 0, 0, 1e-4, 1, 1, self._release))

    def _withdraw(self) -> None:
        self.withdrawn += 1

    def _release(self) -> None:
        self.released += 1


def local_dispatcher(
    checkpoint: Checkpoint,
    mailbox: Mailbox,
    experts: Iterable[Iterable[int]],
    compute: Compute | None = None,
    dtype: torch.dtype = torch.float32,
    config: GatewayConfig | None = None,
) -> tuple[Dispatcher, list[LocalWorker]]:
    """A dispatcher over one worker for each set of experts; every worker holds its set in every layer."""
    compute = compute or partial(reference_rows, checkpoint)
    local = partial(LocalExperts, checkpoint, FloatArithmetic(dtype))
    dispatcher = Dispatcher(
        dtype, config or GatewayConfig(layer_timeout=10, audit=0), ExpertMeter(checkpoint.config), local
    )
    held = {f"worker-{number}:1": list(each) for number, each in enumerate(experts)}
    workers = [LocalWorker(address, compute, mailbox) for address in held]
    layers = checkpoint.config.expert_layers()
    placement = build_placement(
        {address: [(layer, each) for layer in layers for each in mine] for address, mine in held.items()}
    )
    dispatcher.follow(placement, {worker.address: worker for worker in workers})
    return dispatcher, workers
