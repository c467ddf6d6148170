"""The inner loop of every product with int4 weights: some rows of x with 16 output channels, in LLVM's language.

``tile(kind, x, x_stride, x_scales, starts, starts_stride, w, w_scales, words, group, out, out_stride, count)`` computes
    a[m, n, g] = starts[m, g] + sum over the inputs k of group g of x[m, k] · u[n, k]    exact; u is 0 to 15
    t[m, n]    = (0 + a[m, n, 0] · w_scales[0, n]) + a[m, n, 1] · w_scales[1, n] + …    each step rounded by itself
    out[m, n]  = t[m, n] · x_scales[m]                                                   for the first ``count`` n of 16
With -8 · (sum of x over the group) in ``starts`` the weights are u - 8. Arguments are byte addresses and byte strides;
``words`` is K / 8, and ``group`` the words of every group but the last, which may have fewer.

One channel a lane: that is what makes groups cheap, for a group's sums are scaled and added side by side, and nothing
is summed across lanes. Hence the layout, in the order in which it is read (consilium.int4):
    w        int32 [words, 16]    byte i of a word has the inputs i (low half) and 4 + i (high half) of its eight
    w_scales float32 [groups, 16]

The kinds are those of int8_tile: VNNI multiplies and adds four products a lane with one instruction, PORTABLE in 16
bits, where the sum of four products of at most 15 · 128 fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from consilium.kernels.int8_tile import VNNI

CHANNELS = 16  # of a tile
WORD = 8  # inputs in a word
WORD_BYTES = 4 * CHANNELS
AHEAD = 2**11  # bytes ahead that weights are asked for: past the page that the CPU follows by itself

_I1, _I8, _I16, _I32, _I64, _FLOAT = *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64)), ir.FloatType()
_BYTES, _LANES = ir.VectorType(_I8, 64), ir.VectorType(_I32, CHANNELS)
_HALVES, _FLOATS = ir.VectorType(_I16, 32), ir.VectorType(_FLOAT, CHANNELS)
Dot = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]


def define_tile(rows: int) -> Any:
    """The tile of ``rows`` rows of x."""

    def tile(
        context: Any,
        kind: Any,
        x: Any,
        x_stride: Any,
        x_scales: Any,
        starts: Any,
        starts_stride: Any,
        w: Any,
        w_scales: Any,
        words: Any,
        group: Any,
        out: Any,
        out_stride: Any,
        count: Any,
    ) -> Any:
        dot = _dot_vnni if len(kind) == len(VNNI) else _dot_portable

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _Tile(builder, rows, dot).generate(*args[1:])
            return context.get_dummy_value()

        return types.void(kind, *[types.int64] * 12), generate

    return intrinsic(tile)


class _Tile:
    """Writes one tile. Its variables are stack slots, which LLVM turns into registers."""

    def __init__(self, builder: ir.IRBuilder, rows: int, dot: Dot) -> None:
        self._builder, self._rows, self._dot = builder, rows, dot

    def generate(
        self,
        x: ir.Value,
        x_stride: ir.Value,
        x_scales: ir.Value,
        starts: ir.Value,
        starts_stride: ir.Value,
        w: ir.Value,
        w_scales: ir.Value,
        words: ir.Value,
        group: ir.Value,
        out: ir.Value,
        out_stride: ir.Value,
        count: ir.Value,
    ) -> None:
        builder = self._builder
        totals = [self._variable(_FLOATS) for _ in range(self._rows)]
        groups = builder.sdiv(builder.add(words, builder.sub(group, _I64(1))), group)
        with cgutils.for_range(builder, groups) as loop:
            first = builder.mul(loop.index, group)
            left = builder.sub(words, first)
            inside = builder.select(builder.icmp_signed("<", left, group), left, group)
            of_group = [self._at(starts, starts_stride, row, loop.index, 4) for row in range(self._rows)]
            sums = self._group_sums(x, x_stride, of_group, w, first, inside)
            scales = self._load(builder.add(w_scales, builder.mul(loop.index, _I64(WORD_BYTES))), _FLOATS)
            for total, found in zip(totals, sums, strict=True):
                scaled = builder.fmul(builder.sitofp(found, _FLOATS), scales)
                builder.store(builder.fadd(builder.load(total), scaled), total)
        for row, total in enumerate(totals):
            scale = self._everywhere(self._load(builder.add(x_scales, _I64(4 * row)), _FLOAT), _FLOATS)
            place = builder.add(out, builder.mul(out_stride, _I64(row)))
            self._store(builder.fmul(builder.load(total), scale), place, count)

    def _group_sums(
        self,
        x: ir.Value,
        x_stride: ir.Value,
        starts: list[ir.Value],
        w: ir.Value,
        first: ir.Value,
        inside: ir.Value,
    ) -> list[ir.Value]:
        """Of each row with the ``inside`` words from ``first`` on; two sums a row, for neither waits for the other."""
        builder = self._builder
        low_sums = [self._variable(_LANES) for _ in starts]
        high_sums = [self._variable(_LANES) for _ in starts]
        for variable, start in zip(low_sums, starts, strict=True):
            builder.store(self._everywhere(self._load(start, _I32), _LANES), variable)
        with cgutils.for_range(builder, inside) as loop:
            word = builder.add(first, loop.index)
            low, high = self._unpack(builder.add(w, builder.mul(word, _I64(WORD_BYTES))))
            for row in range(len(starts)):
                inputs = self._at(x, x_stride, row, word, WORD)
                for sums, weights, offset in ((low_sums, low, 0), (high_sums, high, WORD // 2)):
                    four = self._load(builder.add(inputs, _I64(offset)), _I32)
                    spread = builder.bitcast(self._everywhere(four, _LANES), _BYTES)
                    builder.store(self._dot(builder, builder.load(sums[row]), weights, spread), sums[row])
        return [
            builder.add(builder.load(low), builder.load(high)) for low, high in zip(low_sums, high_sums, strict=True)
        ]

    def _unpack(self, address: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Four inputs a lane in each of two vectors, from 64 bytes of weights."""
        builder = self._builder
        packed, mask = self._load(address, _HALVES), ir.Constant(_HALVES, [0x0F0F] * 32)
        fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        ahead = builder.inttoptr(builder.add(address, _I64(AHEAD)), _I8.as_pointer())
        builder.call(fetch, [ahead, _I32(0), _I32(3), _I32(1)])
        high = builder.and_(builder.lshr(packed, ir.Constant(_HALVES, [4] * 32)), mask)
        return builder.bitcast(builder.and_(packed, mask), _BYTES), builder.bitcast(high, _BYTES)

    def _variable(self, of: ir.Type) -> ir.Value:
        """A slot that is zero from here on."""
        slot = cgutils.alloca_once(self._builder, of)
        self._builder.store(ir.Constant(of, None), slot)
        return slot

    def _at(self, base: ir.Value, stride: ir.Value, row: int, index: ir.Value, size: int) -> ir.Value:
        builder = self._builder
        return builder.add(builder.add(base, builder.mul(stride, _I64(row))), builder.mul(index, _I64(size)))

    def _load(self, address: ir.Value, of: ir.Type) -> ir.Value:
        loaded = self._builder.load(self._builder.inttoptr(address, of.as_pointer()))
        loaded.align = 1
        return loaded

    def _everywhere(self, value: ir.Value, of: ir.VectorType) -> ir.Value:
        builder, undefined = self._builder, ir.Constant(of, ir.Undefined)
        first = builder.insert_element(undefined, value, _I32(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, of.count), [0] * of.count))

    def _store(self, values: ir.Value, address: ir.Value, count: ir.Value) -> None:
        """The first ``count`` floats."""
        builder, mask_type = self._builder, ir.VectorType(_I1, CHANNELS)
        counts = self._everywhere(builder.trunc(count, _I32), _LANES)
        mask = builder.icmp_signed("<", ir.Constant(_LANES, list(range(CHANNELS))), counts)
        arguments = [_FLOATS, _FLOATS.as_pointer(), _I32, mask_type]
        store = _function(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), arguments)
        builder.call(store, [values, builder.inttoptr(address, _FLOATS.as_pointer()), _I32(4), mask])


def _dot_vnni(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, x: ir.Value) -> ir.Value:
    """total + u · x, four products a lane; u is unsigned."""
    instruction = _function(builder, "llvm.x86.avx512.vpdpbusd.512", _LANES, [_LANES] * 3)
    return builder.call(instruction, [total, builder.bitcast(u, _LANES), builder.bitcast(x, _LANES)])


def _dot_portable(builder: ir.IRBuilder, total: ir.Value, u: ir.Value, x: ir.Value) -> ir.Value:
    wide = ir.VectorType(_I16, 64)
    products = builder.mul(builder.zext(u, wide), builder.sext(x, wide))
    for count in (32, 16):  # neighbours added twice
        undefined = ir.Constant(products.type, ir.Undefined)
        even, odd = (
            builder.shuffle_vector(
                products, undefined, ir.Constant(ir.VectorType(_I32, count), list(range(first, 2 * count, 2)))
            )
            for first in (0, 1)
        )
        products = builder.add(even, odd)
    return builder.add(total, builder.sext(products, _LANES))


def _function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


tile_1, tile_2, tile_4 = map(define_tile, (1, 2, 4))
