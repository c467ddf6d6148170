"""What Consilium reads and writes of the compressed-tensors format: "int-quantized" W8A8. Free of torch.

The format is that of vLLM's llm-compressor (https://github.com/vllm-project/compressed-tensors): config.json says in
`quantization_config` how the weights were quantized; a quantized matrix ``X.weight`` [N, K] is int8, and beside it
``X.weight_scale`` [N, 1] holds one float a row. Activations are quantized per token as the model runs. Matrices that
are float on disk (the `ignore` list) are read as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.errors import CheckpointError

METHOD, FORMAT = "compressed-tensors", "int-quantized"
PACKED, MIXED = "pack-quantized", "mixed-precision"
EXPERTS = r"re:.*\.experts\.[0-9]+\..*"  # the modules that are int4 in a mixed model
SUPPORTED = (
    f"{METHOD} {FORMAT}: 8-bit symmetric integer weights per channel with 8-bit symmetric integer activations, dynamic "
    "per token; or a float32, float16 or bfloat16 checkpoint, which Consilium quantizes itself as it loads"
)
WEIGHT, SCALE = ".weight", ".weight_scale"

# Each key with the values that are understood; the first is what we write. A key that is absent counts as None.
_WEIGHTS: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("channel",),
    "dynamic": (False, None),
    "group_size": (None, -1),
    "block_structure": (None,),
    "actorder": (None,),
}
_ACTIVATIONS: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("token",),
    "dynamic": (True,),
    "group_size": (None, -1),
    "block_structure": (None,),
    "actorder": (None,),
}
_WHOLE: Mapping[str, tuple[object, ...]] = {
    "quant_method": (METHOD,),
    "format": (FORMAT,),
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
}


def quantization_config(
    ignore: list[str], int4_group: int | None = None, *, experts_alone: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of a model whose matrices are all int8 but those named in ``ignore``.

    With ``int4_group`` experts are int4, and so many inputs share a scale; ``experts_alone``: all else is float.
    """

    def first(table: Mapping[str, tuple[object, ...]]) -> dict[str, object]:
        return {key: values[0] for key, values in table.items()}

    group = {
        "targets": [EXPERTS] if experts_alone else ["Linear"],
        "weights": first(_WEIGHTS),
        "input_activations": first(_ACTIVATIONS),
        "output_activations": None,
    }
    if int4_group is None:
        return {**first(_WHOLE), "config_groups": {"group_0": group}, "ignore": ignore}
    int4 = {**first(_WEIGHTS), "num_bits": 4, "strategy": "group", "group_size": int4_group}
    experts = {**group, "targets": [EXPERTS], "weights": int4, "format": PACKED}
    if experts_alone:
        return {**first(_WHOLE), "format": PACKED, "config_groups": {"group_0": experts}, "ignore": ignore}
    groups = {"group_0": experts, "group_1": {**group, "format": FORMAT}}
    return {**first(_WHOLE), "format": MIXED, "config_groups": groups, "ignore": ignore}


def check_quantization_config(file: str, stated: object) -> None:
    """Raise CheckpointError that names the key unless ``stated``, from config.json ``file``, is understood."""
    method = stated.get("quant_method", "unnamed") if isinstance(stated, Mapping) else stated
    if not isinstance(stated, Mapping) or method != METHOD:
        raise CheckpointError(
            f"{file}: checkpoints quantized with {method!r} are not supported; supported: {SUPPORTED}"
        )
    _check(file, "", stated, _WHOLE)
    sparsity = stated.get("sparsity_config") or {}
    _check(file, "sparsity_config.", _mapping(file, "sparsity_config", sparsity), {"format": (None, "dense")})
    groups = _mapping(file, "config_groups", stated.get("config_groups"))
    if not groups:
        raise CheckpointError(f"{file}: quantization_config.config_groups is empty; supported: {SUPPORTED}")
    for name, group in groups.items():
        place = f"config_groups.{name}"
        content = _mapping(file, place, group)
        _check(file, f"{place}.", content, {"output_activations": (None,), "format": (None, FORMAT)})
        for key, table in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
            inner = _mapping(file, f"{place}.{key}", content.get(key))
            _check(file, f"{place}.{key}.", inner, table)


def scale_name(weight: str) -> str:
    """The name of the scales of the matrix called ``weight``."""
    return weight.removesuffix(WEIGHT) + SCALE


def hash_key(layer: int, expert: int, *, int4: bool = False) -> str:
    """The key in a shard's metadata under which `consilium quantize` puts the content hash of an expert."""
    return f"consilium.expert{4 if int4 else ''}.{layer}.{expert}"


def _mapping(file: str, place: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{file}: quantization_config.{place} must be an object, found {value!r}; supported: {SUPPORTED}"
        )
    return value


def _check(file: str, place: str, stated: Mapping[str, Any], table: Mapping[str, tuple[object, ...]]) -> None:
    for key, allowed in table.items():
        value = stated.get(key)
        # By type too: in Python 1 equals True.
        if not any(type(value) is type(each) and value == each for each in allowed):
            expected = " or ".join("nothing" if each is None else repr(each) for each in allowed)
            raise CheckpointError(
                f"{file}: quantization_config.{place}{key} is {value!r}, expected {expected}; supported: {SUPPORTED}"
            )
