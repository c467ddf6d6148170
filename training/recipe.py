"""A recipe: one YAML file that says what is trained from what, and how."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from consilium.config_sources import read_yaml
from consilium.errors import ConfigError
from training.gates import GateOptions
from training.settings import DistillSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitRecipe(_Section):
    """How the neurons become experts."""

    pairs: int = Field(8, gt=0, description="pairs of experts: twice as many experts, one of each pair is active")
    neurons: int = Field(gt=0, description="neurons of an expert; half of a slice's is the least, all of it the most")
    sample_blocks: int = Field(48, gt=0, description="blocks of text that are looked at")
    firing_share: float = Field(0.5, gt=0, lt=1, description="part of the neurons that count as firing for a token")
    shared: int = Field(0, ge=0, description="neurons of every slice that are in both of its experts: always active")
    random: bool = Field(False, description="deal neurons out by chance, for comparison")


class RankRecipe(_Section):
    """Ranks of the adapters."""

    attention: int = Field(32, gt=0)
    ffn: int = Field(48, gt=0)


class GateRecipe(_Section):
    """What balances the load; 0 and null switch each off."""

    aux_weight: float = Field(1e-2, ge=0)
    z_weight: float = Field(1e-4, ge=0)
    noise: float = Field(0.0, ge=0)
    bias_rate: float = Field(0.0, ge=0)
    capacity: float | None = Field(None, gt=0)
    paired: bool = Field(True, description="keep the two experts of a pair exclusive while they learn")


class DistillRecipe(_Section):
    """How the student learns; the words are those of training.settings."""

    steps: int = Field(1000, ge=0, description="0: the split without training, for comparison")
    batch: int = Field(32, gt=0, description="blocks a step")
    learning_rate: float = Field(3e-3, gt=0)
    norm_rate: float = Field(5e-4, ge=0)
    gate_rate: float = Field(1e-5, ge=0)
    warmup: float = Field(0.03, gt=0, lt=1)
    soft_until: float = Field(0.0, ge=0, le=1)
    int8_from: float = Field(1.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    divergence_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(0.5, ge=0)
    clip: float = Field(1.0, gt=0)
    seed: int = 0
    report_every: int = Field(20, gt=0)
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")


class GeneratedRecipe(_Section):
    """Text that the teacher writes itself; its first and last words are its own."""

    topics: Path = Field(description="a text file, a topic a line")
    rows: int = Field(1024, gt=0, description="written at a time")
    length: int = Field(512, gt=1, description="tokens of a row")
    rounds: int = Field(24, gt=0)
    temperatures: tuple[float, ...] = Field((0.8, 0.9, 1.0), min_length=1)
    seed: int = 1


class GrowthRecipe(_Section):
    """Progressive growth: every so many steps each layer's busiest expert is split. Needs `gate.paired: false`."""

    experts: int = Field(0, ge=0, description="how many times; every time one expert more in each layer")
    every: int = Field(100, gt=0, description="steps before each")


class Recipe(_Section):
    """All of it."""

    teacher: Path = Field(description="a llama model: a GGUF file, or a Hugging Face folder")
    text: dict[str, Path] = Field(
        min_length=1, description="corpora by name: .jsonl files (`text` is a document), or texts between blank lines"
    )
    measured_text: dict[str, Path] = Field({}, description="corpora that are never learned from")
    generated: GeneratedRecipe | None = None
    separator: str = Field("<|endoftext|>", description="the token in front of every document")
    held_out: float = Field(0.03, gt=0, lt=0.5, description="part of every corpus's documents that is only measured")
    block_length: int = Field(1024, gt=1)
    dense: bool = Field(False, description="train the teacher itself with the same adapters: the control")
    split: SplitRecipe
    ranks: RankRecipe = RankRecipe()
    gate: GateRecipe = GateRecipe()
    growth: GrowthRecipe = GrowthRecipe()
    distill: DistillRecipe = DistillRecipe()
    delta: bool = Field(False, description="also write delta.npz, small, and make the model out of it")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.growth.experts and (self.gate.paired or self.delta or self.dense):
            raise ValueError("growth.experts: only without delta and dense, and with `gate.paired: false`")
        if self.growth.experts and self.growth.experts * self.growth.every >= self.distill.steps:
            raise ValueError("growth: the last expert comes after the last step; ask for fewer, or a shorter `every`")
        return self

    def settings(self) -> DistillSettings:
        """What the loop is told."""
        gate = self.gate.model_dump(exclude={"paired"})
        distill = self.distill.model_dump(exclude={"checkpoint_every"})
        return DistillSettings(**distill, gate=GateOptions(top_k=self.split.pairs, **gate))

    def digest(self) -> str:
        """Equal for recipes that say the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def rank_list(self) -> tuple[int, ...]:
        """In the order of training.llama.Matrices."""
        return (self.ranks.attention,) * 4 + (self.ranks.ffn,) * 3


def load_recipe(file: Path) -> Recipe:
    """The recipe in ``file``; paths in it are relative to it. Raises ConfigError that names the key."""
    content = read_yaml(file)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {_explain(each)}" for each in error.errors())) from None
    folder = file.parent
    found: dict[str, Any] = {"teacher": folder / recipe.teacher}
    for key in ("text", "measured_text"):
        found[key] = {name: folder / path for name, path in getattr(recipe, key).items()}
    if recipe.generated is not None:
        found["generated"] = recipe.generated.model_copy(update={"topics": folder / recipe.generated.topics})
    return recipe.model_copy(update=found)


def _explain(error: Any) -> str:
    place = ".".join(map(str, error["loc"])) or "the recipe"
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}"
    section: type[BaseModel] = Recipe
    for key in error["loc"][:-1]:
        annotation = section.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    near = difflib.get_close_matches(str(error["loc"][-1]), list(section.model_fields), n=1, cutoff=0.4)
    return f"{place}: there is no such key" + (f"; did you mean {near[0]}?" if near else "")
