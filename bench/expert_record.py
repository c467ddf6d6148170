"""Which experts a model's gate picks, token by token, recorded from a text.

Letters: T tokens, L layers that route, E experts in a layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from consilium.arithmetics import find_arithmetic as find_expert_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import Config
from gateway.arithmetic import find_arithmetic
from gateway.batch import Segment
from gateway.batches import ExpertBatches, ExpertOutputs, experts_of_tokens
from gateway.kv_cache import BLOCK, KVPool, blocks_for
from gateway.local_experts import LocalExperts, run_now
from gateway.model import Model


class _Recorder:
    """An ExpertSource that notes what it is asked for."""

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self.chosen: dict[int, NDArray[np.int64]] = {}  # [T, K] by layer

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        self.chosen[layer] = experts_of_tokens(batches)
        return await self._experts.dispatch(layer, batches)


def record(checkpoint: Checkpoint, tokens: list[int]) -> NDArray[np.int64]:
    """The experts [L, T, K] that each of ``tokens``, seen as one prompt, is sent to in int8."""
    config, settings = checkpoint.config, Config()
    of_experts = find_expert_arithmetic("int8", settings.reply_dtype, config.hidden_size, config.expert_size)
    recorder = _Recorder(LocalExperts(checkpoint, of_experts))
    with torch.inference_mode():
        model = Model(checkpoint, find_arithmetic(settings, config), recorder)
        pool = KVPool(config, torch.float32, blocks_for(len(tokens)) * BLOCK * 4 * config.cached_elements)
        segment = Segment(pool.allocate(len(tokens), len(tokens)), 0, len(tokens), 0)
        run_now(model.forward(model.batch(tokens, [segment])))
    return np.stack([recorder.chosen[layer] for layer in config.expert_layers()])


def steps(chosen: NDArray[np.int64], tokens_per_step: int) -> Iterator[NDArray[np.int64]]:
    """The record [L, T, K] cut into steps, as if each token were of another sequence."""
    for start in range(0, chosen.shape[1] - tokens_per_step + 1, tokens_per_step):
        yield chosen[:, start : start + tokens_per_step]


def count(
    chosen: NDArray[np.int64], experts: int, tokens_per_step: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and reads [L, E] of a record [L, T, K]: pairs, and steps in which an expert is asked for at all."""
    rows = np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in chosen]).astype(float)
    reads = np.zeros_like(rows)
    for step in steps(chosen, tokens_per_step):
        for place, layer in enumerate(step):
            reads[place, np.unique(layer)] += 1
    return rows, reads
