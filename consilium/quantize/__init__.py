"""`consilium quantize`: a float checkpoint becomes an int8 one, smoothed, one layer in memory at a time.

In the order the data flows: ``text`` (calibration tokens) → ``float_layer`` (what a layer computes) → ``calibration``
(how large every channel gets, hence how far it is moved) → ``layer_tensors`` (folded and rounded) → ``unfinished``
(shards, one a layer, and how far the run has come) → ``run`` (all of it).
"""
