"""Threads that share one kernel's work: each takes the next block that nobody has taken, then all of them meet.

Work goes in phases, a phase in blocks that may be computed in any order by any thread. A thread takes blocks of its own
stretch first, so that it reads weights from one end to the other, then what is left of the others'. Nobody waits for a
thread that has not begun: one that comes late, or whose core another process has, finds less to do, or nothing.

A *board* says who has taken what. It is ``board_bytes`` of zeros, new for each call, and outlives every thread's part
in it; ``sharer`` is (board of this phase, part, parts): this thread is number ``part`` of at most ``parts``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from consilium.kernels.compiler import kernel

LINE = 64  # bytes apart: two counters in one cache line would make cores wait for each other
SPINS = 2**12  # looks at a counter before the core is offered to whoever else wants it: some 10 µs

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def board_bytes(phases: int, parts: int) -> int:
    """Zeros that a call of so many phases needs."""
    return LINE * phases * (parts + 1)


def _counter(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _I64.as_pointer())


def _add(context: Any, address: Any, number: Any) -> Any:  # noqa: ARG001
    """Add to the counter at ``address``, in one step for all threads; returns what it was."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.atomic_rmw("add", _counter(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


def _read(context: Any, address: Any) -> Any:  # noqa: ARG001
    """The counter at ``address``; whatever was written before it was counted up is seen from then on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.load_atomic(_counter(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), generate


def _give_way(context: Any) -> Any:  # noqa: ARG001
    """Let another thread have this core, if one wants it (sched_yield of POSIX)."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


# Untyped, for numba gives an intrinsic its first argument by itself.
add: Any = intrinsic(_add)
read: Any = intrinsic(_read)
give_way: Any = intrinsic(_give_way)


@kernel
def take(sharer: Any, blocks: int) -> Any:
    """The next of the phase's ``blocks`` blocks that is not taken yet, -1 when all are."""
    board, part, parts = sharer
    for turn in range(parts):
        owner = (part + turn) % parts
        first, last = blocks * owner // parts, blocks * (owner + 1) // parts
        block = first + add(board + LINE * owner, 1)
        if block < last:
            return block
    return -1


@kernel
def done(sharer: Any) -> None:
    """One taken block is computed."""
    board, _, parts = sharer
    add(board + LINE * parts, 1)


@kernel
def meet(sharer: Any, blocks: int) -> Any:
    """Wait until every block of the phase is computed; what others wrote for it is seen from here on.

    Returns the sharer of the next phase.
    """
    board, part, parts = sharer
    looks = 0
    while read(board + LINE * parts) < blocks:
        looks += 1
        if looks > SPINS:
            give_way()
    return board + LINE * (parts + 1), part, parts
