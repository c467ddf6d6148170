"""How many bytes a model takes in memory while it is served, by arithmetic. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from consilium.config import DenseQuantization, Quantization, RowDType, has_integer_rows
from consilium.formats.scheme import INT4_GROUP
from consilium.inspect.parts import GROUPS, Group, Part, parts
from consilium.model_config import ModelConfig

BYTES: Mapping[RowDType, int] = {"float32": 4, "bfloat16": 2}
LINE = 16  # the rows of a gate, and of int4, are filled up to a multiple of this
# Of a process before it has a weight: Python, torch, gRPC and compiled kernels.
PROCESS = 512 * 2**20


class Mode(NamedTuple):
    """One way to serve."""

    quantization: Quantization
    dtype: RowDType
    group: int = INT4_GROUP  # inputs that share a scale in int4

    @property
    def dense(self) -> DenseQuantization:
        """Of what the gateway multiplies with, where the configuration does not say otherwise."""
        return "int8" if has_integer_rows(self.quantization) else "none"

    def __str__(self) -> str:
        return f"{self.quantization}, {self.dtype}"


MODES = (
    Mode("none", "float32"),
    Mode("none", "bfloat16"),
    Mode("int8-weight-only", "float32"),
    Mode("int8", "float32"),
    Mode("int4", "float32"),
)


def served_bytes(config: ModelConfig, mode: Mode, latent_itemsize: int = 4) -> dict[Group, int]:
    """By group; ``latent_itemsize`` is that of latent attention's matrices of heads, which stay in floats."""
    found: dict[Group, int] = {}
    for part in parts(config):
        found[part.group] = found.get(part.group, 0) + _part_bytes(part, mode, latent_itemsize)
    if config.tie_embeddings and mode.dense == "int8":  # the head is a copy in int8
        found["head"] = found.get("head", 0) + _int8(config.vocab_size, config.hidden_size)
    return {group: found[group] for group in GROUPS if group in found}


def cache_bytes(config: ModelConfig, mode: Mode) -> int:
    """Of the keys and values of one token."""
    return config.cached_elements * BYTES[mode.dtype]


def _part_bytes(part: Part, mode: Mode, latent_itemsize: int) -> int:
    floats = 4 if has_integer_rows(mode.quantization) else BYTES[mode.dtype]  # int8 is quantized from float32
    if part.kind == "latent":
        return part.parameters * latent_itemsize
    if part.kind == "gate":
        return -(-part.rows // LINE) * LINE * part.columns * part.copies * 4
    if part.kind == "float32":
        return part.parameters * 4
    if part.kind == "expert" and mode.quantization == "int4":
        return part.copies * _int4(part.rows, part.columns, mode.group)
    if (part.kind == "expert" and mode.quantization != "none") or (part.kind == "matrix" and mode.dense == "int8"):
        return part.copies * _int8(part.rows, part.columns)
    return part.parameters * floats


def _int4(rows: int, columns: int, group: int) -> int:
    """Half a byte a value, and a float32 scale for each row and group; rows are filled up."""
    return -(-rows // LINE) * LINE * (columns // 2 + 4 * -(-columns // group))


def _int8(rows: int, columns: int) -> int:
    """Values, and a float32 scale for each row."""
    return rows * columns + 4 * rows
