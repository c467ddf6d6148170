"""Which layers see a window only, as `layer_types` states it in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consilium.errors import CheckpointError

KINDS = ("full_attention", "sliding_attention")


def sliding_windows(config: Mapping[str, Any], window: int | None, default: Sequence[bool]) -> tuple[int | None, ...]:
    """``window`` for the layers [L] that slide, None for the others; ``default`` where config.json does not say."""
    stated = config.get("layer_types")
    if stated is None:
        return tuple(window if slides else None for slides in default)
    if not isinstance(stated, list) or len(stated) != len(default) or any(each not in KINDS for each in stated):
        raise CheckpointError(
            f"config.json: layer_types must name {len(default)} layers, each {' or '.join(KINDS)}; "
            f"found {repr(stated)[:80]}"
        )
    if window is None and KINDS[1] in stated:
        raise CheckpointError("config.json: layer_types names sliding_attention, but there is no sliding_window")
    return tuple(window if each == KINDS[1] else None for each in stated)
