"""A layer's experts on a device: down(SiLU(gate(x)) · up(x)) for every pair, in two or three launches.

Letters: U rows, P pairs, E experts, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from consilium.experts import ExpertWeights
from consilium.gpu import products
from consilium.gpu.jit import EXACT, INTERPRETED, power_of_two, tiles_of
from consilium.gpu.quantize import quantize_rows
from consilium.gpu.sort import Groups
from consilium.gpu.tiling import Blocks, Tiling
from consilium.int4 import Int4
from consilium.model_config import ClampedSwiGLU
from consilium.quantization import Quantized

COLUMNS: int = products.COLUMNS.value
DTYPES = {torch.int8: tl.int8, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """What all experts of a model have in common."""

    hidden_size: int
    expert_size: int
    rows: torch.dtype  # int8 with scales, or a float
    weights: torch.dtype  # int8 with scales, or the rows' float
    replies: torch.dtype
    biased: bool = False
    activation: ClampedSwiGLU | None = None


def form_of(weights: ExpertWeights, rows: torch.dtype, replies: torch.dtype) -> ExpertForm:
    """The form of experts like this one."""
    if isinstance(weights.gate, Int4):
        raise TypeError("there is no int4 on devices")
    gate = weights.gate.values if isinstance(weights.gate, Quantized) else weights.gate
    size, hidden = gate.shape
    return ExpertForm(hidden, size, rows, gate.dtype, replies, weights.biases is not None, weights.activation)


def columns_of(form: ExpertForm) -> list[int]:
    """Which columns of a table an expert's tensors have, in their order."""
    matrices = list(range(6)) if form.weights is torch.int8 else [0, 2, 4]
    return matrices + [6, 7, 8] * form.biased


def table_of(form: ExpertForm, experts: Sequence[ExpertWeights | None]) -> Tensor:
    """Where the tensors of ``experts`` lie, as kernels read it: int64 [E, COLUMNS], zeros where one is not held.

    It is made on the host; kernels want it beside the weights.
    """
    table = np.zeros((len(experts), COLUMNS), np.int64)
    held = [number for number, weights in enumerate(experts) if weights is not None]
    if held:
        addresses = np.concatenate([weights.addresses for weights in experts if weights is not None])
        table[np.ix_(held, columns_of(form))] = addresses.reshape(len(held), -1)
    return torch.from_numpy(table)


def compute(
    form: ExpertForm, tiling: Tiling, table: Tensor, groups: Groups, x: Tensor, scales: Tensor | None, out: Tensor
) -> None:
    """Write the output row of every pair of ``groups`` to its place in ``out`` [.., D].

    ``x`` [U, D], int8 with ``scales`` [U] or floats; ``groups`` were cut into tiles of ``tiling.block_m``.
    """
    if len(groups.source):
        hidden, largest = gate_up(form, tiling.gate_up, table, groups, x, scales)
        down(form, tiling.down, table, groups, hidden, None if tiling.quantize_first else largest, out)


def gate_up(
    form: ExpertForm, blocks: Blocks, table: Tensor, groups: Groups, x: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden rows [P, F] in the pairs' order; for integers also the largest magnitudes of their parts, int32 [P, .]."""
    columns = tiles_of(form.expert_size, blocks.n)
    integers = form.rows is torch.int8
    pairs = len(groups.source)
    hidden = torch.empty(pairs, form.expert_size, dtype=torch.float32 if integers else form.rows, device=x.device)
    largest = torch.empty(pairs, columns, dtype=torch.int32, device=x.device)
    how = form.activation or ClampedSwiGLU(0.0, 0.0)
    products.gate_up[(len(groups.tiles), columns)](
        table,
        groups.tiles,
        groups.source,
        x,
        largest if scales is None else scales,
        _bits(hidden),
        largest,
        how.alpha,
        how.limit,
        **_constants(form, groups.block, blocks),
        CLAMPED=form.activation is not None,
        HIDDEN=DTYPES[hidden.dtype],
    )
    return hidden, largest


def down(
    form: ExpertForm,
    blocks: Blocks,
    table: Tensor,
    groups: Groups,
    hidden: Tensor,
    largest: Tensor | None,
    out: Tensor,
) -> None:
    """Output rows from what gate_up found; without ``largest`` a kernel of its own quantizes integers first."""
    tiles, of_rows = 0, groups.source  # floats have no scales: whatever is there is not read
    if form.rows is torch.int8 and largest is not None:
        tiles, of_rows = largest.shape[1], largest
    elif form.rows is torch.int8:
        hidden, of_rows = quantize_rows(hidden)
    products.down[(len(groups.tiles), tiles_of(form.hidden_size, blocks.n))](
        table,
        groups.tiles,
        groups.target,
        hidden,
        of_rows,
        _bits(out),
        **_constants(form, groups.block, blocks),
        REPLY=DTYPES[form.replies],
        TILES=tiles,
        TILES_BLOCK=power_of_two(tiles),
    )


def _constants(form: ExpertForm, block_m: int, blocks: Blocks) -> dict[str, Any]:
    # The interpreter cannot multiply bfloat16; in float32 the products are the same, and only the sums differ.
    dot = torch.float32 if INTERPRETED and form.rows is torch.bfloat16 else form.rows
    return {
        "D": form.hidden_size,
        "F": form.expert_size,
        "INTEGER": form.rows is torch.int8,
        "SCALED": form.weights is torch.int8,
        "W": DTYPES[form.weights],
        "BIASED": form.biased,
        "DOT": DTYPES[dot],
        "BLOCK_M": block_m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        **EXACT,
    }


def _bits(rows: Tensor) -> Tensor:
    """As kernels store it: bfloat16 bit by bit."""
    return rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows
