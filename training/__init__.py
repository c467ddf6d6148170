"""Dense to sparse: a Llama-style model becomes a trained Mixture of Experts. Nothing that serves imports it.

In the order the data flows: ``data`` (fetches ``corpora``), ``texts`` and ``generate`` (the teacher's own) → ``blocks``
(packed tokens, held-out parts) → ``teacher`` (the dense weights, computed with by ``llama``) → ``coactivation`` and
``split`` (neurons into experts, a first gate) → ``student`` with ``gates`` → ``distill`` (``losses``, ``growth``),
watched over by ``journal`` (``checkpoints``, ``curves``) → ``measure`` → ``delta`` (what the repository keeps). ``run``
puts it together; ``switches`` measures what each switch of the gate does.
"""
