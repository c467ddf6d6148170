"""A device model without its engine: texts that are computed in steps, and whether their bits are what they should be.

Letters: T rows of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.models import resolve_model
from gateway.arithmetic import find_arithmetic
from gateway.batch import Segment
from gateway.gpu.experts import ExpertHalf, load_experts
from gateway.gpu.model import DeviceModel
from gateway.gpu.pages import PagePool
from gateway.gpu.tiling import FLOAT32, INVARIANT, Tiling
from gateway.kv_cache import KVPool
from gateway.local_experts import local_experts, run_now
from gateway.messages import Generate, SamplingParams
from gateway.model import Model
from gateway.sequence import Sequence

T = TypeVar("T")
Drive = Callable[[Coroutine[Any, None, Tensor]], Tensor]


@dataclass(slots=True)
class Text:
    """Tokens, of which the first ones are computed."""

    sequence: Sequence
    cache: Any
    computed: int = 0

    @property
    def rest(self) -> int:
        return len(self.sequence.tokens) - self.computed


@dataclass(slots=True)
class Texts:
    """What an engine does between steps, as far as a measurement needs it."""

    model: DeviceModel | Model
    pool: Any
    drive: Drive = run_now
    _made: int = field(default=0, init=False)

    def start(self, tokens: list[int], capacity: int) -> Text:
        """A text of which nothing is computed yet, with room for ``capacity`` tokens."""
        self._made += 1
        request = Generate(self._made, tokens, SamplingParams(capacity, temperature=0, ignore_eos=True))
        return Text(Sequence.start(request), self.pool.allocate(capacity, capacity))

    def step(self, parts: list[tuple[Text, int]]) -> Tensor:
        """The hidden states [T, D] of so many further tokens of each text. Raises RuntimeError where a row fails."""
        tokens: list[int] = []
        segments: list[Segment] = []
        for text, count in parts:
            segments.append(Segment(text.cache, len(tokens), count, text.computed))
            tokens += text.sequence.tokens[text.computed : text.computed + count]
            text.computed += count
        batch = self.model.batch(tokens, segments)
        hidden = self.drive(self.model.forward(batch))  # type: ignore[arg-type]  # its own
        for row, error in batch.failures.items():
            raise RuntimeError(f"{len(batch.failures)} of {len(tokens)} rows failed; row {row}: {error}")
        return hidden

    def decode(self, texts: list[Text]) -> Tensor:
        """One more token for each text, and the hidden states [T, D] that it was chosen by."""
        hidden = self.step([(text, 1) for text in texts])
        chosen = self.model.choose(self.model.logits(hidden), [text.sequence for text in texts], ())
        if min(chosen) < 0:
            raise RuntimeError("logits are not finite")
        for text, token in zip(texts, chosen, strict=True):
            text.sequence.append(token, ())
        return hidden

    def end(self, texts: list[Text]) -> None:
        """Give their memory back."""
        for text in texts:
            self.pool.free(text.cache)


def device_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    memory: int,
    experts: ExpertHalf | None = None,
    tilings: tuple[Tiling, Tiling] = INVARIANT,
) -> DeviceModel:
    """The model with so many bytes for keys and values of ``dtype``; by default with all its experts on the device."""
    half = experts or load_experts(checkpoint, device)
    pool = PagePool(checkpoint.config, dtype, memory, device)
    return DeviceModel(checkpoint, half, lambda: pool, tilings, device)


def random_text(length: int, vocabulary: int, seed: int) -> list[int]:
    """The same for the same seed."""
    tokens: list[int] = torch.randint(2, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def check_bits(model: DeviceModel, vocabulary: int, lengths: tuple[int, ...], decoded: int) -> None:
    """Raise RuntimeError unless rows have the same bits as part of a prompt, of a chunk, and decoded side by side."""
    texts = Texts(model, model.pool)
    prompts = [random_text(length, vocabulary, seed) for seed, length in enumerate(lengths)]
    whole = [texts.start(each, len(each)) for each in prompts]
    expected = [texts.step([(text, text.rest)]) for text in whole]
    beside = [texts.start(each, len(each)) for each in prompts]
    first = [(text, text.rest // 2) for text in beside]
    chunks = texts.step(first).split([count for _, count in first])
    rest = [(text, text.rest - decoded) for text in beside]
    more = texts.step(rest).split([count for _, count in rest])
    # In a graph: run, recorded, replayed, always with the same memory for what it returns.
    singles = [texts.step([(text, 1) for text in beside]).clone() for _ in range(decoded)]
    for number, alone in enumerate(expected):
        found = torch.cat([chunks[number], more[number], *(each[number : number + 1] for each in singles)])
        if not torch.equal(found, alone):
            rows = (found != alone).any(1).nonzero().flatten().tolist()
            raise RuntimeError(f"rows {rows} of text {number} depend on what they are computed with")
    texts.end(whole + beside)


def difference_from_cpu(shape: str, device: torch.device, length: int) -> float:
    """The mean difference of log-probabilities from the CPU's, with keys and values in float32; nearly nothing."""
    checkpoint = Checkpoint(resolve_model(shape))
    config = Config.model_validate({"model": shape})
    prompt = random_text(length, checkpoint.config.vocab_size, 0)
    on_device = device_model(checkpoint, device, torch.float32, 2**24, tilings=FLOAT32)
    cpu = Model(checkpoint, find_arithmetic(config, checkpoint.config), local_experts(config, checkpoint))
    found = []
    for model, pool in ((on_device, on_device.pool), (cpu, KVPool(checkpoint.config, torch.float32, 2**24))):
        texts = Texts(model, pool)
        text = texts.start(prompt, length)
        found.append(model.logits(texts.step([(text, length)])).cpu().log_softmax(-1))
    return float((found[0] - found[1]).abs().mean())
