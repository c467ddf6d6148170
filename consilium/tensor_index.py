"""Which safetensors files a model folder has, and which tensor lies where. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from consilium.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_index(file: Path, weight_map: object) -> Mapping[str, str]:
    """The ``weight_map`` of an index, once it is seen to name only safetensors files of its own folder.

    Raises CheckpointError that names ``file``.
    """
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map must map tensor names to files")
    for shard in set(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map names {shard!r}, which is no .safetensors file of this folder")
    return {name: str(shard) for name, shard in weight_map.items()}
