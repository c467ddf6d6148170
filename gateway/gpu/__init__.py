"""The gateway's half of a model on a GPU. Imported only where ``gateway.device`` is one.

In the order to read them: ``model`` (the layers of a step), ``heads``, ``attention``, ``gate``, ``combine`` and
``sampling`` (its kernels, beside those of consilium.gpu), ``pages`` (keys and values), ``batch`` (the rows of a step).
"""
