"""Checkpoints as they are published quantized, read as floats: what computes quantizes them again in its own way.

``scheme`` (what config.json says) → ``source`` (tensors by their usual names, decoded when they are read) → one module
for each way to store a matrix: ``fp8``, ``mxfp4``, ``packed`` (compressed-tensors), ``awq_gptq``.
"""
