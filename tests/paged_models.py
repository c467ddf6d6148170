"""An int8 checkpoint on disk whose experts are worth reading one by one."""

from __future__ import annotations

from pathlib import Path

from consilium.shapes.folder import ShapeFolder, parse_shape
from consilium.shapes.write import write_shape


def write_paged(folder: Path, expert_size: int = 48, hidden_size: int = 64, experts: int = 8) -> Path:
    """The tiny shape with other sizes: two layers of experts of 3 · ``expert_size`` · ``hidden_size`` bytes each."""
    tiny = parse_shape("shape:tiny,seed=3")
    sizes = {"moe_intermediate_size": expert_size, "hidden_size": hidden_size, "num_experts": experts}
    write_shape(ShapeFolder(tiny.name, tiny.recipe, {**tiny.config, **sizes}), folder)
    return folder
