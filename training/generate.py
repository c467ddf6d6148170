"""Text that the teacher writes itself: many rows at once, one token a step, replayed as CUDA graphs on a GPU.

A row is a chain of segments. A segment's prompt is fed as it is; then the teacher samples until it ends a message or a
document, and the row's next segment starts. So rows never wait for each other, and every row is full.
Letters: R rows, M segments of a row, P longest prompt, L tokens of a row, n positions attended to, D hidden size,
H query heads, G key-value heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nn
from numpy.typing import NDArray
from torch import Tensor

from training.blocks import Tokens
from training.llama import Dense, rope_tables, rotate

# Attention reads the cache up to a multiple of this: one CUDA graph for each.
BUCKET = 64
# A token less likely than this times the likeliest is never drawn (min-p, Nguyen et al. 2024).
LEAST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Segments:
    """The prompts of every row."""

    tokens: NDArray[np.int64]  # [R, M, P], padded
    lengths: NDArray[np.int64]  # [R, M], all above 0


def lay_segments(prompts: Iterator[Sequence[int]], rows: int, segments: int, longest: int) -> Segments:
    """The next prompts for ``rows`` rows; those longer than ``longest`` are passed over."""
    tokens = np.zeros((rows, segments, longest), np.int64)
    lengths = np.zeros((rows, segments), np.int64)
    for place in np.ndindex(rows, segments):
        prompt = next(each for each in prompts if 0 < len(each) <= longest)
        tokens[place][: len(prompt)], lengths[place] = prompt, len(prompt)
    return Segments(tokens, lengths)


class Sampler:
    """Rows of one model, all at the same position."""

    def __init__(self, model: Dense, rows: int, length: int, ends: Sequence[int], never: Sequence[int]) -> None:
        """``ends`` are the tokens that end a segment, ``never`` those that are not drawn."""
        self._model, self._rows, self._length = model, rows, length
        shape, device, dtype = model.shape, model.embed.device, model.embed.dtype
        cache = (shape.num_layers, rows, shape.num_kv_heads, length, shape.head_dim)
        self._keys, self._values = (
            torch.zeros(cache, device=device, dtype=dtype),
            torch.zeros(cache, device=device, dtype=dtype),
        )
        self._rope = rope_tables(shape, length, device, dtype)
        self._qkv = [torch.cat((w.q, w.k, w.v)) for _, w in model.layers]
        self._gate_up = [torch.cat((w.gate, w.up)) for _, w in model.layers]
        self._ends = torch.zeros(shape.vocab_size, dtype=torch.bool, device=device)
        self._ends[list(ends)] = True
        self._never = torch.zeros(shape.vocab_size, dtype=torch.bool, device=device)
        self._never[list(never)] = True
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._token = torch.zeros(rows, dtype=torch.int64, device=device)
        self._segment = torch.zeros(rows, dtype=torch.int64, device=device)
        self._fed = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of the prompt that were fed
        self._heat = torch.ones(rows, 1, device=device)
        self._out = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._prompts = self._lengths = torch.zeros(0)

    @torch.inference_mode()
    def sample(self, segments: Segments, temperatures: NDArray[np.float32]) -> Tokens:
        """Full rows [R, L] for new segments, each row at its own temperature [R]."""
        self._set_prompts(segments)
        self._heat.copy_(torch.from_numpy(temperatures)[:, None])
        self._position.zero_()
        self._segment.zero_()
        self._fed.fill_(1)
        self._token.copy_(self._prompts[:, 0, 0])
        self._out.zero_()
        self._out[:, 0] = self._token
        for position in range(self._length - 1):
            self._run((position // BUCKET + 1) * BUCKET)
        return self._out.cpu().numpy().astype(np.uint16)

    def _set_prompts(self, segments: Segments) -> None:
        prompts, lengths = torch.from_numpy(segments.tokens), torch.from_numpy(segments.lengths)
        if self._prompts.shape == prompts.shape:  # graphs remember where they were
            self._prompts.copy_(prompts)
            self._lengths.copy_(lengths)
        else:
            device = self._token.device
            self._prompts, self._lengths = prompts.to(device), lengths.to(device)

    def _run(self, seen: int) -> None:
        """One step that attends to the first ``seen`` positions at most."""
        seen = min(seen, self._length)
        if not self._token.is_cuda:
            self._step(seen)
            return
        if seen not in self._graphs:
            state = [t.clone() for t in (self._position, self._token, self._segment, self._fed)]
            self._step(seen)  # loads what the capture must not load
            for kept, now in zip(state, (self._position, self._token, self._segment, self._fed), strict=True):
                now.copy_(kept)
            torch.cuda.synchronize()
            self._graphs[seen] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[seen]):
                self._step(seen)
        self._graphs[seen].replay()

    def _step(self, seen: int) -> None:
        drawn = self._draw(self._logits(seen))  # [R]
        rows = torch.arange(self._rows, device=drawn.device)
        feeding = self._fed < self._lengths[rows, self._segment]
        ended = ~feeding & self._ends[drawn]
        place = self._fed.clamp(max=self._prompts.shape[2] - 1)
        token = torch.where(feeding, self._prompts[rows, self._segment, place], drawn)
        self._fed.copy_(torch.where(ended, 0, self._fed + feeding))
        last = self._prompts.shape[1] - 1
        self._segment.copy_((self._segment + ended).clamp(max=last))
        self._position += 1
        self._out.index_copy_(1, self._position, token[:, None])
        self._token.copy_(token)

    def _draw(self, logits: Tensor) -> Tensor:
        """One token a row from logits [R, V]: min-p, then the largest after Gumbel noise."""
        scaled = logits.float() / self._heat
        scaled.masked_fill_(self._never, -torch.inf)
        scaled.masked_fill_(scaled < scaled.amax(1, keepdim=True) + math.log(LEAST_SHARE), -torch.inf)
        noise = torch.empty_like(scaled).exponential_().log_()  # minus a Gumbel variable
        return (scaled - noise).argmax(1)

    def _logits(self, seen: int) -> Tensor:
        """[R, V] after the current tokens, which join the cache."""
        shape, model = self._model.shape, self._model
        x = model.embed[self._token]  # [R, D]
        cos, sin = (table.index_select(0, self._position) for table in self._rope)  # [1, d]
        mask = torch.where(torch.arange(seen, device=x.device) <= self._position, 0.0, -torch.inf).to(x.dtype)
        for number, (norms, w) in enumerate(model.layers):
            normed = nn.rms_norm(x, norms.attention.shape, norms.attention, shape.rms_norm_eps)
            heads = nn.linear(normed, self._qkv[number]).view(self._rows, -1, 1, shape.head_dim)
            q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
            keys, values = self._keys[number], self._values[number]
            keys.index_copy_(2, self._position, rotate(k, cos, sin))
            values.index_copy_(2, self._position, v)
            # The query heads of a group are rows of one product: [R, G, H / G, d].
            q = rotate(q, cos, sin).view(self._rows, shape.num_kv_heads, -1, shape.head_dim)
            seen_mask = mask.expand(*q.shape[:3], seen)
            out = nn.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], attn_mask=seen_mask)
            x = x + nn.linear(out.reshape(self._rows, -1), w.o)
            normed = nn.rms_norm(x, norms.ffn.shape, norms.ffn, shape.rms_norm_eps)
            gate, up = nn.linear(normed, self._gate_up[number]).chunk(2, dim=1)
            x = x + nn.linear(nn.silu(gate) * up, w.down)
        return nn.linear(nn.rms_norm(x, model.final_norm.shape, model.final_norm, shape.rms_norm_eps), model.embed)
