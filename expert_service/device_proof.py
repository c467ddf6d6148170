"""A device's kernels are held against the CPU's before they serve anybody; thereby they are compiled, too.

Letters: D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consilium.checkpoint import ExpertBiases, ExpertTensors
from consilium.errors import ConsiliumError
from consilium.experts import Arithmetic, ExpertWeights
from consilium.gpu.experts import ExpertForm
from consilium.gpu.tiling import Tilings
from consilium.quantization import quantize_rows
from expert_service.device_arithmetic import DeviceArithmetic

FLOAT_BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the norm of what differs


def prove(
    host: Arithmetic,
    form: ExpertForm,
    tilings: Tilings,
    device: torch.device,
    place: Callable[[ExpertWeights], ExpertWeights],
) -> None:
    """Every tiling with one row, and with more than a tile has. Raises ConsiliumError where one is wrong."""
    experts = [host.prepare(_expert(form, seed)) for seed in range(2)]
    placed = [place(weights) for weights in experts]
    for batch, tiling in tilings:
        served = DeviceArithmetic(host, form, [(batch, tiling)], device, "")
        for count in (1, tiling.block_m + 1):
            rows, scales = _rows(form, count)
            offsets = [0, 1, 1 + count]
            indices = torch.cat((torch.zeros(1, dtype=torch.int32), torch.arange(count, dtype=torch.int32)))
            expected = host.compute(experts, offsets, rows, scales, None, indices)
            found = served.compute(placed, offsets, rows, scales, None, indices)
            if not _right(form, found, expected):
                raise ConsiliumError(
                    f"the device computes {count} rows wrong in {tiling}; run this worker with --device cpu"
                )


def _right(form: ExpertForm, found: Tensor, expected: Tensor) -> bool:
    if form.rows is torch.int8:
        return torch.equal(found, expected)
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return bool(difference < FLOAT_BOUNDS[form.rows])  # False for NaN


def _rows(form: ExpertForm, count: int) -> tuple[Tensor, Tensor | None]:
    """Integers reach their extremes in every row, and in all of the first one's elements."""
    x = torch.randn(count, form.hidden_size, generator=torch.Generator().manual_seed(count))
    x[0] = x[0].sign()
    return quantize_rows(x) if form.rows is torch.int8 else (x.to(form.rows), None)


def _expert(form: ExpertForm, seed: int) -> ExpertTensors:
    """Outputs are about as large as the rows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = 2 * [(form.expert_size, form.hidden_size)] + [(form.hidden_size, form.expert_size)]
    gate, up, down = (torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes)
    gate[0] = gate[0].sign()
    biases = None
    if form.biased:
        biases = ExpertBiases(*(torch.randn(shape[0], generator=generator) for shape in shapes))
    return ExpertTensors(gate, up, down, biases, form.activation)
