"""What the headers of a folder's safetensors files say, by group of weights. No weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from consilium.families import Names
from consilium.inspect.parts import Group
from consilium.model_folder import ModelFolder, read_json
from consilium.shapes.folder import ShapeFolder
from consilium.tensor_header import StoredTensor, read_header
from consilium.tensor_index import INDEX_FILE, SINGLE_FILE, check_index

# What is added to the name of a tensor whose parts a quantized checkpoint holds apart.
_PARTS = r"(?:\..*|_blocks|_scales|_bias)?"


def stored_tensors(model: ModelFolder) -> list[StoredTensor] | None:
    """Every tensor; None where the folder has a config.json alone. Raises CheckpointError that names a damaged file."""
    if isinstance(model.path, ShapeFolder):
        return _of_shape(model, model.path)
    index = model.path / INDEX_FILE
    if index.is_file():
        files = sorted(set(check_index(index, read_json(index).get("weight_map")).values()))
    elif (model.path / SINGLE_FILE).is_file():
        files = [SINGLE_FILE]
    else:
        return None
    return [tensor for file in files for tensor in read_header(model.path / file)]


def stored_bytes(tensors: list[StoredTensor], names: Names, layers: int) -> dict[Group | str, dict[str, int]]:
    """Bytes by group and dtype; ``not read`` is what no layer of the model needs."""
    patterns = list(_patterns(names))
    found: dict[Group | str, dict[str, int]] = {}
    for name, dtype, nbytes, _ in tensors:
        if names.other_spelling is not None:
            family, other = names.other_spelling
            name = name.replace(other, family)
        group = next((group for group, pattern in patterns if _within(pattern.fullmatch(name), layers)), "not read")
        of = found.setdefault(group, {})
        of[dtype] = of.get(dtype, 0) + nbytes
    return found


def _within(match: re.Match[str] | None, layers: int) -> bool:
    """Whether it is a name, and of a layer that the model has."""
    return match is not None and int(match.groupdict().get("layer") or 0) < layers


def _patterns(names: Names) -> Iterator[tuple[Group, re.Pattern[str]]]:
    """Of the names of each group; the first that matches counts."""

    def pattern(template: str) -> re.Pattern[str]:
        stem = re.escape(template.removesuffix(".weight"))
        stem = stem.replace(r"\{layer\}", "(?P<layer>[0-9]+)").replace(r"\{expert\}", "[0-9]+")
        return re.compile(stem + _PARTS)

    for layout in names.experts:
        yield from (
            ("experts", pattern(each)) for each in (layout.gate, layout.up, layout.down, layout.gate_up) if each
        )
    if names.shared is not None:
        shared = (names.shared.gate, names.shared.up, names.shared.down, names.shared_gate)
        yield from (("shared experts", pattern(each)) for each in shared if each)
    gates = (names.router, names.router_bias, names.correction)
    yield from (("gates", pattern(each)) for each in gates if each)
    if names.dense is not None:
        yield from (("dense layers", pattern(each)) for each in (names.dense.gate, names.dense.up, names.dense.down))
    yield from (("norms", pattern(each)) for each in (names.input_norm, names.post_norm, names.final_norm))
    yield "attention", pattern(names.q_proj.rpartition(".")[0])
    yield "embedding", pattern(names.embed)
    yield "head", pattern(names.head)


def _of_shape(model: ModelFolder, folder: ShapeFolder) -> list[StoredTensor]:
    from consilium.shapes.tensors import RandomTensors  # brings torch

    tensors = RandomTensors(folder.recipe, model.config, model.family.names)
    sizes = {"I8": 1, "F32": 4, "BF16": 2}
    found = []
    for name in tensors:
        tensor = tensors.find(name)
        size = sizes[tensor.get_dtype()]
        for extent in tensor.get_shape():
            size *= extent
        found.append(StoredTensor(name, tensor.get_dtype(), size))
    return found
