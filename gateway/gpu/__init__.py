"""The gateway's half of a model on a GPU. Imported only where ``gateway.device`` is one.

In the order to read them: ``setup`` (from the configuration), ``model`` and ``layer`` (a step), ``batch`` (its rows),
``pages`` (keys and values), ``graphs``, ``experts`` (the other half), ``choose``; and the kernels, beside those of
consilium.gpu: ``heads``, ``tiling`` and ``attention``, ``gate``, ``combine``, ``sampling``.
"""
