"""The inner loop of every float sum: a tile of products summed in order, in LLVM's language.

``tile(form, a, a_row, a_step, b, b_step, b_vector, size, out, out_row, out_vector)`` with M rows and N vectors of 16
lanes fixed by the tile's name computes
    out[m, n] = sum over k = 0, 1, …, size - 1, in this order, of a[m, k] · b[k, n]          each b[k, n] 16 floats
Every multiply and every add is rounded by itself, and each lane has one accumulator that starts at +0, so an element's
bits depend on its own row of ``a`` and column of ``b`` and on nothing else: not on M, N, or the width of the CPU.
Arguments but ``size`` are byte addresses and byte strides. ``form`` says by its type what b is made of (see int8_tile).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Form = tuple[int, ...]
FLOAT32: Form = ()
BFLOAT16: Form = (0,)
LANES = 16

_I16, _I32, _I64, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_HALVES, _WORDS = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES)


def define_tile(rows: int, vectors: int) -> Any:
    """The tile of ``rows`` rows of a and ``vectors`` vectors of b."""

    def tile(
        context: Any,
        form: Any,
        a: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        b_vector: Any,
        size: Any,
        out: Any,
        out_row: Any,
        out_vector: Any,
    ) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            _generate(builder, rows, vectors, len(form) == len(BFLOAT16), *args[1:])
            return context.get_dummy_value()

        return types.void(form, *[types.int64] * 10), generate

    return intrinsic(tile)


def _generate(
    builder: ir.IRBuilder,
    rows: int,
    vectors: int,
    half: bool,
    a: ir.Value,
    a_row: ir.Value,
    a_step: ir.Value,
    b: ir.Value,
    b_step: ir.Value,
    b_vector: ir.Value,
    size: ir.Value,
    out: ir.Value,
    out_row: ir.Value,
    out_vector: ir.Value,
) -> None:
    entry = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(_I64)
    k.add_incoming(_I64(0), entry)
    totals = [builder.phi(_VECTOR) for _ in range(rows * vectors)]
    for total in totals:
        total.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), entry)
    builder.cbranch(builder.icmp_signed("<", k, size), body, done)

    builder.position_at_end(body)
    a_place, b_place = builder.add(a, builder.mul(a_step, k)), builder.add(b, builder.mul(b_step, k))
    columns = [_load(builder, builder.add(b_place, builder.mul(b_vector, _I64(n))), half) for n in range(vectors)]
    for m in range(rows):
        address = builder.add(a_place, builder.mul(a_row, _I64(m)))
        value = _splat(builder, builder.load(builder.inttoptr(address, _FLOAT.as_pointer()), align=4))
        for n, column in enumerate(columns):
            total = totals[m * vectors + n]
            total.add_incoming(builder.fadd(total, builder.fmul(value, column)), body)
    k.add_incoming(builder.add(k, _I64(1)), body)
    builder.branch(head)

    builder.position_at_end(done)
    for m in range(rows):
        for n in range(vectors):
            place = builder.add(out, builder.add(builder.mul(out_row, _I64(m)), builder.mul(out_vector, _I64(n))))
            builder.store(totals[m * vectors + n], builder.inttoptr(place, _VECTOR.as_pointer()), align=4)


def _load(builder: ir.IRBuilder, address: ir.Value, half: bool) -> ir.Value:
    if not half:
        return builder.load(builder.inttoptr(address, _VECTOR.as_pointer()), align=4)
    halves = builder.load(builder.inttoptr(address, _HALVES.as_pointer()), align=2)
    bits = builder.shl(builder.zext(halves, _WORDS), ir.Constant(_WORDS, [16] * LANES))
    return builder.bitcast(bits, _VECTOR)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_WORDS, [0] * LANES))


tile_1x1, tile_1x4, tile_2x4, tile_4x4 = (define_tile(*shape) for shape in ((1, 1), (1, 4), (2, 4), (4, 4)))
