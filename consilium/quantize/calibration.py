"""How large every channel of a layer gets over the calibration text, and how far smoothing therefore moves it.

Letters: N tokens, P of those that go to one expert, D hidden size, H query heads, d head size, E experts, F FFN size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.quantize.float_layer import FloatLayer
from consilium.smoothing import Exponents, LayerExponents, choose_exponents

# Positions that a calibration token sees at most.
WINDOW = 1024


class Strengths(NamedTuple):
    """SmoothQuant's alpha for each place: 0 follows the weights alone, 1 the activations alone."""

    attention: float
    ffn: float
    hidden: float
    head: float


# Each place's best of 0.4 to 0.8 on the default model, by divergence from `none` over 2,048 tokens of docstrings. Nats
# without smoothing and with: attention 0.0121, 0.0020; ffn 0.0069, 0.0017; hidden 0.0031, 0.0024; head 0.0081, 0.0040.
STRENGTHS = Strengths(attention=0.8, ffn=0.8, hidden=0.5, head=0.5)


def calibrate_layer(
    layer: FloatLayer, x: Tensor, window: int = WINDOW, strengths: Strengths = STRENGTHS
) -> tuple[LayerExponents, Tensor]:
    """The layer's exponents for the text whose hidden states are x [N, D], and the hidden states behind the layer.

    Every ``window`` rows of x are a text of their own.
    """
    normed = layer.norm(x, layer.input_norm)  # [N, D]
    window = min(window, layer.config.max_position)
    heads = torch.cat([layer.attend(each) for each in normed.split(window)])  # [N, H * d]
    x = x + layer.output(heads)
    inputs = _columns(layer.q, layer.k, layer.v)
    attention = _choose(_columns(normed), inputs, strengths.attention)
    ffn, hidden, y = _calibrate_ffn(layer, layer.norm(x, layer.post_norm), strengths)
    return LayerExponents(attention, ffn, hidden), x + y


def embed(checkpoint: Checkpoint, tokens: list[int]) -> Tensor:
    """The hidden states [N, D] in front of the first layer."""
    config = checkpoint.config
    embedding = checkpoint.tensor(checkpoint.names.embed, (config.vocab_size, config.hidden_size))
    return embedding[torch.tensor(tokens)].float()


def calibrate_head(checkpoint: Checkpoint, x: Tensor, strength: float = STRENGTHS.head) -> Exponents:
    """The exponents of the final norm and the head, for hidden states x [N, D] behind the last layer."""
    norm = checkpoint.tensor(checkpoint.names.final_norm, (x.shape[1],)).float()
    normed = nn.rms_norm(x, norm.shape, norm, checkpoint.config.rms_norm_eps)
    return _choose(_columns(normed), _columns(read_head(checkpoint)), strength)


def read_head(checkpoint: Checkpoint) -> Tensor:
    """The head [V, D] in float32, which may be the embedding."""
    config, names = checkpoint.config, checkpoint.names
    name = names.embed if config.tie_embeddings else names.head
    return checkpoint.tensor(name, (config.vocab_size, config.hidden_size)).float()


def _calibrate_ffn(layer: FloatLayer, x: Tensor, strengths: Strengths) -> tuple[Exponents, Exponents, Tensor]:
    """For normed rows [N, D]: the exponents [D] and [E, F], and the layer's output [N, D].

    An expert that no token of the text goes to keeps its hidden channels where they are.
    """
    routing = layer.route(x)
    y, inputs, hidden = torch.zeros_like(x), torch.zeros(x.shape[1]), []
    for expert in range(layer.experts):
        gate, up, down = layer.expert(expert)
        inputs = torch.maximum(inputs, _columns(gate, up))
        tokens, slots = (routing.ids == expert).nonzero(as_tuple=True)  # [P] each
        z = nn.silu(nn.linear(x[tokens], gate)) * nn.linear(x[tokens], up)  # [P, F]
        hidden.append(_choose(_columns(z), _columns(down), strengths.hidden))
        y.index_add_(0, tokens, nn.linear(z, down) * routing.weights[tokens, slots, None])
    return _choose(_columns(x), inputs, strengths.ffn), np.stack(hidden), y


def _columns(*matrices: Tensor) -> Tensor:
    """The largest magnitude in each column; 0 where there are no rows."""
    largest = [m.abs().amax(0) if len(m) else m.new_zeros(m.shape[1]) for m in matrices]
    return torch.stack(largest).amax(0)


def _choose(activations: Tensor, weights: Tensor, strength: float) -> Exponents:
    return choose_exponents(activations.numpy(), weights.numpy(), strength)
