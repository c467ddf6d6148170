"""Every tensor of a model, by what config.json says of it. Free of torch.

Letters: D hidden size, E experts in a layer, F expert FFN size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from consilium.model_config import LatentConfig, ModelConfig

Group = Literal["embedding", "head", "attention", "gates", "experts", "shared experts", "dense layers", "norms"]
GROUPS: tuple[Group, ...] = (
    "embedding",
    "attention",
    "norms",
    "gates",
    "experts",
    "shared experts",
    "dense layers",
    "head",
)
# How the gateway or a worker keeps it: matrices may become int8, the rest stays in floats.
Kind = Literal["expert", "matrix", "latent", "gate", "embedding", "float", "float32"]


class Part(NamedTuple):
    """``copies`` tensors [rows, columns]; a vector has one column."""

    group: Group
    kind: Kind
    rows: int
    columns: int = 1
    copies: int = 1

    @property
    def parameters(self) -> int:
        return self.rows * self.columns * self.copies


def parts(config: ModelConfig) -> Iterator[Part]:
    """All of them; a head that is tied to the embedding has no parameters of its own."""
    hidden, vocabulary, layers = config.hidden_size, config.vocab_size, config.num_layers
    yield Part("embedding", "embedding", vocabulary, hidden)
    norms = (2 * layers + 1) * (2 if config.layer_norm else 1)  # a layer norm has a bias, too
    yield Part("norms", "float", hidden, copies=norms)
    yield from _latent(config, config.latent) if config.latent else _attention(config)
    yield from _routed(config)
    if not config.tie_embeddings:
        yield Part("head", "matrix", vocabulary, hidden)
    if config.head_bias:
        yield Part("head", "float", vocabulary)


def count_parameters(config: ModelConfig) -> dict[Group, int]:
    """By group, of those that the model has."""
    found: dict[Group, int] = {}
    for part in parts(config):
        found[part.group] = found.get(part.group, 0) + part.parameters
    return {group: found[group] for group in GROUPS if group in found}


def count_active(config: ModelConfig) -> int:
    """The parameters that one token is computed with: all but those of the experts it does not go to."""
    counts = count_parameters(config)
    return sum(counts.values()) - counts["experts"] // config.num_experts * (config.num_experts - config.top_k)


def _attention(config: ModelConfig) -> Iterator[Part]:
    hidden, layers = config.hidden_size, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Part("attention", "matrix", queries + 2 * keys, hidden, layers)
    yield Part("attention", "matrix", hidden, config.heads_size, layers)
    if config.attention_bias:
        biases = queries + 2 * keys + (hidden if config.output_bias else 0)
        yield Part("attention", "float", biases, copies=layers)
    if config.qk_norm:
        norms = queries + keys if config.qk_norm_whole else 2 * config.head_dim
        yield Part("attention", "float32", norms, copies=layers)
    if config.sinks:
        yield Part("attention", "float32", config.num_heads, copies=layers)


def _latent(config: ModelConfig, of: LatentConfig) -> Iterator[Part]:
    hidden, layers = config.hidden_size, config.num_layers
    queries, cached = config.num_heads * (of.plain_size + of.rotated_size), of.rank + of.rotated_size
    yield Part("attention", "matrix", (of.query_rank or queries) + cached, hidden, layers)
    yield Part("attention", "latent", config.num_heads * (of.plain_size + of.value_size), of.rank, layers)
    yield Part("attention", "matrix", hidden, config.heads_size, layers)
    yield Part("attention", "float32", of.rank + (of.query_rank or 0), copies=layers)  # norms
    if of.query_rank:
        yield Part("attention", "matrix", queries, of.query_rank, layers)
    if config.attention_bias:
        yield Part("attention", "float", (of.query_rank or 0) + cached + hidden, copies=layers)


def _routed(config: ModelConfig) -> Iterator[Part]:
    hidden, experts, routed = config.hidden_size, config.num_experts, len(config.expert_layers())
    yield Part("gates", "gate", experts, hidden, routed)
    biases = experts * (config.gate.logit_bias + config.gate.correction)
    if biases:
        yield Part("gates", "float32", biases, copies=routed)
    yield from _ffn("experts", "expert", config.expert_size, hidden, routed * experts)
    if config.expert_bias:
        yield Part("experts", "float32", 2 * config.expert_size + hidden, copies=routed * experts)
    if config.shared_size:
        yield from _ffn("shared experts", "matrix", config.shared_size, hidden, routed)
    if config.shared_gate:
        yield Part("shared experts", "gate", 1, hidden, routed)
    if config.num_layers > routed:
        yield from _ffn("dense layers", "matrix", config.dense_size, hidden, config.num_layers - routed)


def _ffn(group: Group, kind: Kind, size: int, hidden: int, count: int) -> Iterator[Part]:
    yield Part(group, kind, size, hidden, 2 * count)
    yield Part(group, kind, hidden, size, count)
