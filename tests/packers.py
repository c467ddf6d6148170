"""Random weights in the formats of published checkpoints, each number packed as its description says, one by one.

Every packer returns a matrix's parts by the ends of their names, and the matrix [N, K] that they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[dict[str, Tensor], Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the output that lies in each place of a word, low bits first


def fp8(rows: int, columns: int, block: tuple[int, int], scale: str = "weight_scale_inv") -> Parts:
    """DeepSeek-V3: e4m3 bytes, and a scale for each block."""
    codes = torch.randint(0, 127, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))  # no NaN
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.rand(grid) / 2000 + 1e-5
    spread = scales[torch.arange(rows)[:, None] // block[0], torch.arange(columns) // block[1]]
    weight = torch.tensor([e4m3(code) for code in range(256)])[codes] * spread
    return {"weight": codes.to(torch.uint8).view(torch.float8_e4m3fn), scale: scales}, weight


def e4m3(code: int) -> float:
    """OCP 8-bit floating point: a sign, four bits of exponent with bias 7, three of mantissa, no infinity."""
    sign, exponent, mantissa = -1 if code & 128 else 1, (code >> 3) & 15, code & 7
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


def pack_quantized(rows: int, columns: int, bits: int, group: int, *, zeros: bool, order: bool) -> Parts:
    """compressed-tensors: values along the inputs, zero points along the outputs, all half the range higher."""
    half, groups = 2 ** (bits - 1), columns // group
    values, zero = torch.randint(-half, half, (rows, columns)), torch.randint(-half, half, (rows, groups))
    zero = zero if zeros else torch.zeros_like(zero)
    scales, indices = (torch.rand(rows, groups) / half / 4).bfloat16(), _groups(columns, group, order=order)
    parts = {
        "weight_packed": pack(values + half, bits, list(range(32 // bits))),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        parts["weight_zero_point"] = pack((zero + half).T, bits, list(range(32 // bits))).T.contiguous()
    if order:
        parts["weight_g_idx"] = indices
    return parts, _dequantized(values, zero, scales, indices)


def awq(rows: int, columns: int, group: int) -> Parts:
    """AutoAWQ's gemm: the transpose, packed along the outputs in AWQ's order."""
    groups = columns // group
    values, zero = torch.randint(0, 16, (rows, columns)), torch.randint(0, 16, (rows, groups))
    scales = (torch.rand(rows, groups) / 30).half()
    parts = {
        "qweight": pack(values.T, 4, AWQ_ORDER),
        "qzeros": pack(zero.T, 4, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return parts, _dequantized(values, zero, scales, _groups(columns, group, order=False))


def gptq(
    rows: int,
    columns: int,
    bits: int,
    group: int,
    *,
    order: bool,
    first_version: bool = True,
    symmetric: bool = False,
) -> Parts:
    """AutoGPTQ: the transpose, packed along the inputs; zero points along the outputs, at first less one."""
    groups, places = columns // group, list(range(32 // bits))
    values, zero = torch.randint(0, 2**bits, (rows, columns)), torch.randint(1, 2**bits, (rows, groups))
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    scales, indices = (torch.rand(rows, groups) / 2**bits).half(), _groups(columns, group, order=order)
    parts = {
        "qweight": pack(values, bits, places).T.contiguous(),
        "qzeros": pack(zero.T - int(first_version), bits, places),
        "scales": scales.T.contiguous(),
    }
    if order:
        parts["g_idx"] = indices
    return parts, _dequantized(values, zero, scales, indices)


def mxfp4(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """gpt-oss: blocks [E, N, K / 32, 16] of two codes a byte, and exponents [E, N, K / 32]."""
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 125, blocks.shape[:3], dtype=torch.uint8)


def pack(values: Tensor, bits: int, order: list[int] | tuple[int, ...]) -> Tensor:
    """int32 [n, m * bits / 32] from unsigned numbers [n, m]; ``order``: which of a word's numbers is in each place."""
    count = len(order)
    words = torch.zeros(len(values), -(-values.shape[1] // count), dtype=torch.int64)
    for column in range(words.shape[1]):
        for place, number in enumerate(order):
            if column * count + number < values.shape[1]:
                words[:, column] |= values[:, column * count + number].long() << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _groups(columns: int, group: int, *, order: bool) -> Tensor:
    """The group of each input; in ``order`` of importance neighbours are of different ones."""
    indices = torch.arange(columns, dtype=torch.int32) // group
    return indices[torch.randperm(columns)] if order else indices


def _dequantized(values: Tensor, zero: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    weight = torch.empty(values.shape)
    for k, group in enumerate(indices.tolist()):
        weight[:, k] = (values[:, k] - zero[:, group]).float() * scales[:, group].float()
    return weight
