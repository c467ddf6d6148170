"""Kernels of ours for the CPU: what must give the same bits whatever the batch, and be fast at few rows.

In the order to read them: ``compiler`` (how numba compiles them), ``int8_tile`` and ``float_tile`` (the two inner
loops, written in LLVM's own language), ``arithmetic`` (exp, quantizing a row), and what is built from those:
``linear``, ``experts``, ``norm``, ``product``, ``attention``, ``gate``. Kernels take addresses (``Tensor.data_ptr()``)
and sizes, check nothing and release the interpreter lock; their callers stand elsewhere (consilium.integer_product,
consilium.int8_experts, gateway.attention, …).

Integer sums are exact, so their order is free. Float sums have one order each, written where the sum is, that depends
on nothing but the row itself; multiplies and adds are rounded one by one, never fused.
"""
