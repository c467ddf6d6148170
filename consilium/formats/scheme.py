"""What config.json says of how its weights are stored. Free of torch.

Activations are quantized as our arithmetic does it, whatever the checkpoint says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from consilium.compressed_tensors import FORMAT, METHOD, PACKED, SUPPORTED, check_quantization_config
from consilium.errors import CheckpointError

Kind = Literal["int8", "fp8", "mxfp4", "packed", "awq", "gptq"]
# Inputs that share a scale in int4 (consilium.int4) where the checkpoint does not say: the default model loses 15 % of
# perplexity with 32 and 27 % with 64.
INT4_GROUP = 32
WHOLE_ROW = 128  # where all of a row do, their scale is repeated
_METHODS = "fp8, mxfp4, awq, gptq"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How matrices are stored; those that are float on disk are read as they are."""

    kind: Kind
    bits: int = 8
    block: tuple[int, int] | None = None  # rows and columns that share a scale in fp8; None: as the scales' shape says
    scale: str = ""  # the name of fp8's scales behind that of the module
    zero_offset: int = 0  # what gptq adds to a stored zero point
    group_size: int = 0  # inputs that share a scale in gptq, where no g_idx says so; 0: all of them
    # Inputs that share a scale where matrices are symmetric int4, which int4 experts take as they are; 0: they are not.
    int4_group: int = 0
    experts: Scheme | None = None  # that of the experts, where it is another one


def find_scheme(file: str, stated: object) -> Scheme:
    """The scheme that ``stated``, `quantization_config` of config.json ``file``, names.

    Raises CheckpointError that names the key that is not understood, and what is.
    """
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if isinstance(stated, Mapping) and isinstance(method, str) and method in _PARSERS:
        return _PARSERS[method](file, stated)
    if isinstance(stated, Mapping) and method == METHOD and stated.get("format") in _COMPRESSED:
        return _COMPRESSED[stated["format"]](file, stated)
    check_quantization_config(file, stated)
    return Scheme("int8")


def _fp8(file: str, stated: Mapping[str, Any]) -> Scheme:
    """DeepSeek-V3's: blocks of float8_e4m3fn, each with a scale (DeepSeek-AI 2024, section 3.3)."""
    _check(file, stated, {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)})
    block = _block(file, "weight_block_size", stated.get("weight_block_size"))
    return Scheme("fp8", block=block, scale="weight_scale_inv")


def _mxfp4(_file: str, _stated: Mapping[str, Any]) -> Scheme:
    return Scheme("mxfp4", 4)


def _awq(file: str, stated: Mapping[str, Any]) -> Scheme:
    _check(file, stated, {"bits": (4,), "version": ("gemm", "GEMM", None), "zero_point": (True, None)})
    return Scheme("awq", 4)


def _gptq(file: str, stated: Mapping[str, Any]) -> Scheme:
    _check(file, stated, {"bits": (4, 8), "checkpoint_format": ("gptq", "gptq_v2", None), "dynamic": (None, {})})
    size = stated.get("group_size", -1)
    if type(size) is not int or size < -1 or size == 0:
        raise _wrong(file, "group_size", size, "a positive number or -1")
    exact = stated["bits"] == 4 and stated.get("sym") is True and not stated.get("desc_act")
    offset = 0 if stated.get("checkpoint_format") == "gptq_v2" else 1  # the first version stores one less
    return Scheme(
        "gptq",
        stated["bits"],
        zero_offset=offset,
        group_size=max(size, 0),
        int4_group=_int4_group(size) if exact else 0,
    )


def _packed(file: str, stated: Mapping[str, Any]) -> Scheme:
    """compressed-tensors, integers packed into int32."""
    bits, groups = set[int](), set[int]()
    for weights in _weights(file, stated):
        _check(file, weights, {"type": ("int",), "strategy": ("group", "channel"), "num_bits": (4, 8)}, "weights.")
        bits.add(weights["num_bits"])
        exact = weights["num_bits"] == 4 and weights.get("symmetric") is True and not weights.get("actorder")
        groups.add(_int4_group(weights.get("group_size")) if exact else 0)
    if len(bits) > 1:
        raise _wrong(file, "config_groups", sorted(bits), "groups of equally many bits")
    return Scheme("packed", bits.pop(), int4_group=groups.pop() if len(groups) == 1 else 0)


def _mixed(file: str, stated: Mapping[str, Any]) -> Scheme:
    """compressed-tensors, each group in a format of its own: ours, with int8 for all but the experts."""
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _wrong(file, "config_groups", groups, "objects with weights")
    packed = {name: group for name, group in groups.items() if group.get("format") == PACKED}
    others = {name: group for name, group in groups.items() if name not in packed}
    experts = _packed(file, {**stated, "config_groups": packed})
    check_quantization_config(file, {**stated, "format": FORMAT, "config_groups": others})
    return Scheme("int8", experts=experts)


def _int4_group(stated: object) -> int:
    """Inputs that share a scale; 0 where int4 has no such groups."""
    if stated in (None, -1):
        return WHOLE_ROW
    return stated if isinstance(stated, int) and stated > 0 and stated % 8 == 0 else 0


def _float8(file: str, stated: Mapping[str, Any]) -> Scheme:
    """compressed-tensors, float8_e4m3fn with a scale for each tensor, row or block."""
    blocks: list[object] = []
    for weights in _weights(file, stated):
        allowed = {"type": ("float",), "num_bits": (8,), "strategy": ("tensor", "channel", "block")}
        _check(file, weights, {**allowed, "symmetric": (True, None)}, "weights.")
        blocks.append(weights.get("block_structure"))
    if any(block != blocks[0] for block in blocks):
        raise _wrong(file, "config_groups", blocks, "groups of equal blocks")
    block = None if blocks[0] is None else _block(file, "config_groups: weights.block_structure", blocks[0])
    return Scheme("fp8", block=block, scale="weight_scale")


def _block(file: str, key: str, stated: object) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if not isinstance(stated, list) or len(stated) != 2 or not all(type(each) is int and each > 0 for each in stated):
        raise _wrong(file, key, stated, "two positive numbers")
    return stated[0], stated[1]


_PARSERS: Mapping[str, Callable[[str, Mapping[str, Any]], Scheme]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
}
_COMPRESSED: Mapping[str, Callable[[str, Mapping[str, Any]], Scheme]] = {
    PACKED: _packed,
    "float-quantized": _float8,
    "mixed-precision": _mixed,
}


def _weights(file: str, stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each of the config groups says of its weights."""
    groups = stated.get("config_groups")
    if not isinstance(groups, Mapping):
        raise _wrong(file, "config_groups", groups, "objects with weights")
    found = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    weights = [each for each in found if isinstance(each, Mapping)]
    if not weights or len(weights) < len(groups):
        raise _wrong(file, "config_groups", groups, "objects with weights")
    return weights


def _check(file: str, stated: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]], place: str = "") -> None:
    for key, values in allowed.items():
        found = stated.get(key)
        if not any(type(found) is type(value) and found == value for value in values):
            expected = " or ".join("nothing" if value is None else repr(value) for value in values)
            raise _wrong(file, place + key, found, expected)


def _wrong(file: str, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: quantization_config.{key} is {found!r}, expected {expected}; supported: {SUPPORTED}; and {_METHODS}"
    )
