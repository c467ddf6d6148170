"""Kernels of ours for GPUs, in Triton, and the functions over tensors that launch them.

In the order to read them: ``jit`` (how they are compiled, or interpreted), ``arithmetic`` (exp, SiLU, quantizing,
bfloat16: the bits of consilium.kernels.arithmetic), ``quantize``, ``sort`` (pairs by expert), ``products`` and
``experts``. Tensors of one call lie on one device; nothing waits for it, so that everything may stand in a CUDA graph.

Nothing here is imported where the device is the CPU: Triton is no dependency there. The tests run the same kernels on
CPU tensors, in Triton's interpreter.
"""
