"""Shapes: models of the sizes of known ones, without files, whose weights are seeded random numbers.

``sizes`` (what each shape's config.json says) → ``folder`` (a name such as ``shape:olmoe-1b-7b,layers=4`` as a model
folder in memory, with a ``tokenizer``) → ``tensors`` (made when they are asked for) → ``write`` (the same on disk).
"""
