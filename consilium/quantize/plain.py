"""Families without smoothing: experts are rounded, everything else is copied, to be quantized as it is loaded.

What smoothing may move where is known of mixtral and qwen3_moe (consilium.smoothing); in others a norm may feed a
shared expert, a latent, or a gate that is not linear in it. So these compute the same bits as the float checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError
from consilium.other_tensors import other_names, read
from consilium.quantize.layer_tensors import Shard, add_expert
from consilium.quantize.unfinished import Progress


def check_separate(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where the family has no name for a matrix of one expert."""
    if checkpoint.names.experts[0].fused:
        raise CheckpointError(
            f"consilium quantize cannot write {checkpoint.config.family} models: the experts of a layer are one tensor "
            "in them, and int8 has scales for each; serve the float checkpoint, which is quantized as it is loaded"
        )


def write_plain(checkpoint: Checkpoint, progress: Progress, advance: Callable[[], None], *, int4: bool) -> None:
    """Shards: what is of no layer, then every layer."""
    names = other_names(checkpoint)
    for number in range(progress.done, checkpoint.config.num_layers + 1):
        layer = None if number == 0 else number - 1
        shard = Shard({})
        for name in names[layer]:
            shard.add_float(name, read(checkpoint, name))
        if layer is not None and checkpoint.config.moe_layers[layer]:
            for expert in range(checkpoint.config.num_experts):
                add_expert(shard, checkpoint, layer, expert, checkpoint.expert(layer, expert).floats(), int4=int4)
        progress.add(shard, None)
        advance()
