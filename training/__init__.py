"""Dense to sparse: a Llama-style model becomes a trained Mixture of Experts. Nothing that serves imports it.

In the order the data flows: ``corpora`` (real text) and ``generate`` (the teacher's own) → ``blocks`` (packed tokens,
held-out parts) → ``teacher`` (the dense weights, computed with by ``llama``) → ``coactivation`` and ``split`` (neurons
into experts, a first gate) → ``student`` with ``gates`` → ``distill`` (``losses``, ``checkpoints``) → ``measure`` →
``delta`` (what the repository keeps).
"""
