"""The inner loop of every int8 product: a tile of dot products, exact, in LLVM's language.

``tile(kind, x, x_stride, w, w_stride, size, sums, sums_stride, fetch, fetches)``, M x N rows fixed by its name, is
    sums[m][n] = sum over k < size of x[m][k] · w[n][k]  (plus 128 · sum of x[m], for the kind VNNI; see ``shifted``)
for rows of int8 at byte addresses; strides are in bytes. Nothing beyond ``size`` is read. Meanwhile it asks the memory
for ``fetches`` (0 to N) rows at ``fetch``, ``w_stride`` apart: rows are too short for the CPU to foresee the next ones.

Two kinds, told apart by their type, so that numba compiles a kernel for each kind it is called with:
VNNI      vpdpbusd multiplies unsigned by signed bytes and adds four products into 32 bits without saturating. The
          weights are made unsigned by flipping their sign bits as they are loaded, which adds 128 to each.
PORTABLE  sign-extends to 16 bits, where any product of two int8 fits, and adds in 32 bits; for any CPU, Arm too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Kind = tuple[int, ...]
VNNI: Kind = ()
PORTABLE: Kind = (0,)
NAMES = {VNNI: "AVX-512 VNNI", PORTABLE: "portable"}

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_LANES = ir.VectorType(_I32, 16)  # one accumulator


def candidates() -> list[Kind]:
    """The kinds whose instructions this CPU has, fastest first."""
    features = llvm.get_host_cpu_features()
    return [VNNI, PORTABLE] if features.get("avx512vnni") and features.get("avx512bw") else [PORTABLE]


def define_tile(rows: int, columns: int) -> Any:
    """The tile of ``rows`` rows of x and ``columns`` rows of w."""

    def tile(
        context: Any,
        kind: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        w_stride: Any,
        size: Any,
        sums: Any,
        sums_stride: Any,
        fetch: Any,
        fetches: Any,
    ) -> Any:
        signature = types.void(kind, *[types.int64] * 9)
        vnni = len(kind) == len(VNNI)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _Tile(builder, rows, columns, _dot_vnni if vnni else _dot_portable, 64 if vnni else 16).generate(*args[1:])
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(tile)


class _Tile:
    """Writes one tile: a loop over whole vectors, then one masked vector for the rest."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, columns: int, dot: Callable[..., ir.Value], width: int
    ) -> None:
        self._builder, self._rows, self._columns, self._dot, self._width = builder, rows, columns, dot, width
        self._vector = ir.VectorType(_I8, width)

    def generate(
        self,
        x: ir.Value,
        x_stride: ir.Value,
        w: ir.Value,
        w_stride: ir.Value,
        size: ir.Value,
        sums: ir.Value,
        sums_stride: ir.Value,
        fetch: ir.Value,
        fetches: ir.Value,
    ) -> None:
        builder = self._builder
        fetched = [builder.add(fetch, builder.mul(w_stride, _I64(row))) for row in range(self._columns)]
        x_rows = [builder.add(x, builder.mul(x_stride, _I64(row))) for row in range(self._rows)]
        w_rows = [builder.add(w, builder.mul(w_stride, _I64(row))) for row in range(self._columns)]
        whole = builder.and_(size, _I64(-self._width))
        totals = self._loop(x_rows, w_rows, whole, fetched, fetches)
        totals = self._rest(totals, x_rows, w_rows, whole, size)
        reduce = _function(builder, "llvm.vector.reduce.add.v16i32", _I32, [_LANES])
        for row in range(self._rows):
            place = builder.add(sums, builder.mul(sums_stride, _I64(row)))
            for column in range(self._columns):
                total = builder.call(reduce, [totals[row * self._columns + column]])
                address = builder.add(place, _I64(4 * column))
                builder.store(total, builder.inttoptr(address, _I32.as_pointer()), align=4)

    def _loop(
        self,
        x_rows: list[ir.Value],
        w_rows: list[ir.Value],
        whole: ir.Value,
        fetched: list[ir.Value],
        fetches: ir.Value,
    ) -> list[ir.Value]:
        builder, entry = self._builder, self._builder.block
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        position = builder.phi(_I64)
        position.add_incoming(_I64(0), entry)
        totals = [builder.phi(_LANES) for _ in range(self._rows * self._columns)]
        for total in totals:
            total.add_incoming(ir.Constant(_LANES, [0] * 16), entry)
        builder.cbranch(builder.icmp_signed("<", position, whole), body, done)
        builder.position_at_end(body)
        self._prefetch(fetched, fetches, position)
        following = self._accumulate(totals, x_rows, w_rows, position, self._load)
        position.add_incoming(builder.add(position, _I64(self._width)), builder.block)
        for total, next_total in zip(totals, following, strict=True):
            total.add_incoming(next_total, builder.block)
        builder.branch(head)
        builder.position_at_end(done)
        return totals

    def _rest(
        self,
        totals: list[ir.Value],
        x_rows: list[ir.Value],
        w_rows: list[ir.Value],
        whole: ir.Value,
        size: ir.Value,
    ) -> list[ir.Value]:
        builder, before = self._builder, self._builder.block
        rest = builder.sub(size, whole)
        tail, end = builder.append_basic_block("tail"), builder.append_basic_block("end")
        builder.cbranch(builder.icmp_signed(">", rest, _I64(0)), tail, end)
        builder.position_at_end(tail)
        mask = self._mask(rest)
        name = f"llvm.masked.load.v{self._width}i8.p0"
        mask_type = ir.VectorType(_I1, self._width)
        masked = _function(builder, name, self._vector, [self._vector.as_pointer(), _I32, mask_type, self._vector])

        def load(address: ir.Value) -> ir.Value:
            zeros = ir.Constant(self._vector, [0] * self._width)
            return builder.call(masked, [builder.inttoptr(address, self._vector.as_pointer()), _I32(1), mask, zeros])

        following = self._accumulate(totals, x_rows, w_rows, whole, load)
        last = builder.block
        builder.branch(end)
        builder.position_at_end(end)
        merged = []
        for total, next_total in zip(totals, following, strict=True):
            either = builder.phi(_LANES)
            either.add_incoming(total, before)
            either.add_incoming(next_total, last)
            merged.append(either)
        return merged

    def _accumulate(
        self,
        totals: list[ir.Value],
        x_rows: list[ir.Value],
        w_rows: list[ir.Value],
        position: ir.Value,
        load: Callable[[ir.Value], ir.Value],
    ) -> list[ir.Value]:
        """The totals after one more vector of every row; each weight is loaded once for all rows of x."""
        builder = self._builder
        weights = [load(builder.add(row, position)) for row in w_rows]
        following = []
        for index, row in enumerate(x_rows):
            x = load(builder.add(row, position))
            for column, w in enumerate(weights):
                following.append(self._dot(builder, totals[index * self._columns + column], x, w))
        return following

    def _prefetch(self, rows: list[ir.Value], count: ir.Value, position: ir.Value) -> None:
        """Ask for the same place in each of the first ``count`` rows."""
        builder = self._builder
        fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        for number, row in enumerate(rows):
            with builder.if_then(builder.icmp_signed(">", count, _I64(number))):
                address = builder.inttoptr(builder.add(row, position), _I8.as_pointer())
                builder.call(fetch, [address, _I32(0), _I32(3), _I32(1)])

    def _load(self, address: ir.Value) -> ir.Value:
        loaded = self._builder.load(self._builder.inttoptr(address, self._vector.as_pointer()))
        loaded.align = 1
        return loaded

    def _mask(self, count: ir.Value) -> ir.Value:
        """True in the first ``count`` lanes."""
        builder, width = self._builder, self._width
        first = builder.insert_element(ir.Constant(self._vector, ir.Undefined), builder.trunc(count, _I8), _I32(0))
        everywhere = ir.Constant(ir.VectorType(_I32, width), [0] * width)
        counts = builder.shuffle_vector(first, ir.Constant(self._vector, ir.Undefined), everywhere)
        return builder.icmp_unsigned("<", ir.Constant(self._vector, list(range(width))), counts)


def _dot_vnni(builder: ir.IRBuilder, total: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    """total + (w + 128) · x, four products a lane."""
    instruction = _function(builder, "llvm.x86.avx512.vpdpbusd.512", _LANES, [_LANES] * 3)
    unsigned = builder.xor(w, ir.Constant(w.type, [-128] * w.type.count))
    return builder.call(instruction, [total, builder.bitcast(unsigned, _LANES), builder.bitcast(x, _LANES)])


def _dot_portable(builder: ir.IRBuilder, total: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    """total + w · x, a product a lane."""
    wide = ir.VectorType(_I16, x.type.count)
    product = builder.mul(builder.sext(x, wide), builder.sext(w, wide))
    return builder.add(total, builder.sext(product, _LANES))


def _function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


# Four rows of x and four of w keep 16 accumulators in registers, and load half a vector for each product.
tile_1x1, tile_1x4, tile_2x4, tile_4x4 = (define_tile(*shape) for shape in ((1, 1), (1, 4), (2, 4), (4, 4)))
