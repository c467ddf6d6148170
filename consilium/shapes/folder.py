"""A shape's name as a model folder in memory: its small files are made when they are read. Free of torch.

The name is ``shape:NAME``, then parameters if any: ``shape:olmoe-1b-7b,layers=4,seed=1``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from consilium.compressed_tensors import quantization_config
from consilium.errors import ConfigError
from consilium.families import find_family, parse_config
from consilium.shapes.sizes import SHAPES
from consilium.shapes.tokenizer import tokenizer_config, tokenizer_json

PREFIX = "shape:"
PARAMETERS = {"layers": (1, 4096), "experts": (1, 4096), "seed": (0, 2**63 - 1)}  # the least and the most of each
# The key of config.json that says which random weights belong to it; what they are made from is in its value.
RECIPE_KEY = "consilium_random_weights"
# Raise it when a shape's weights would differ: processes of different versions then refuse each other.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a tensor's values depend on, beside its own name and shape."""

    shape: str
    seed: int


@dataclass(frozen=True)
class ShapeFolder:
    """What readers of a model's small files need of a folder, as pathlib.Path has it."""

    name: str  # shape:NAME, with the parameters that are given
    recipe: Recipe
    config: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, file: str) -> ShapeFile:
        return ShapeFile(f"{self.name}/{file}", self.files().get(file))

    def files(self) -> dict[str, Callable[[], str]]:
        """The text of every file that is there, by name."""
        return {
            "config.json": lambda: _dump(self.config),
            "tokenizer.json": partial(_tokenizer_json, self.config["vocab_size"]),
            "tokenizer_config.json": lambda: _dump(tokenizer_config()),
        }


@dataclass(frozen=True, slots=True)
class ShapeFile:
    """A file of a shape's folder, which may be missing."""

    path: str
    make: Callable[[], str] | None

    def __str__(self) -> str:
        return self.path

    def is_file(self) -> bool:
        return self.make is not None

    def read_text(self, encoding: str) -> str:  # noqa: ARG002 (pathlib's signature; the text is made as text)
        """The content. Raises FileNotFoundError."""
        if self.make is None:
            raise FileNotFoundError(self.path)
        return self.make()


def parse_shape(name: str) -> ShapeFolder:
    """The folder that ``shape:…`` names, with or without the prefix. Raises ConfigError with what there is."""
    name = PREFIX + name.removeprefix(PREFIX)
    shape, *stated = name.removeprefix(PREFIX).split(",")
    if shape not in SHAPES:
        raise ConfigError(f"model: there is no shape {shape!r}; choose from {', '.join(sorted(SHAPES))}")
    values = dict(_parameter(each) for each in stated)
    if len(values) < len(stated):
        raise ConfigError(f"model: {name} gives a parameter twice")
    recipe = Recipe(shape, values.pop("seed", 0))
    config = dict(SHAPES[shape])
    if "layers" in values:
        config["num_hidden_layers"] = values["layers"]
    if "experts" in values:
        config["num_local_experts" if "num_local_experts" in config else "num_experts"] = values["experts"]
    _check(name, config, values)
    family, layers = find_family(config), parse_config(config).expert_layers()
    routers = [family.names.router.format(layer=layer).removesuffix(".weight") for layer in layers]
    config["quantization_config"] = quantization_config(routers)
    config[RECIPE_KEY] = {"shape": recipe.shape, "seed": recipe.seed, "version": VERSION}
    return ShapeFolder(name, recipe, config)


def _check(name: str, config: Mapping[str, Any], values: Mapping[str, int]) -> None:
    """Raise ConfigError for parameters that leave nothing to serve."""
    top_k = config["num_experts_per_tok"]
    if values.get("experts", top_k) < top_k:
        raise ConfigError(f"model: {name}: each token asks {top_k} experts, so experts must be at least {top_k}")
    if config["num_hidden_layers"] == 1 and config.get("mlp_only_layers"):
        raise ConfigError(f"model: {name}: the first layer has no experts, so layers must be at least 2")


def _parameter(text: str) -> tuple[str, int]:
    key, _, value = text.partition("=")
    if key not in PARAMETERS:
        raise ConfigError(
            f"model: shapes have no parameter {key!r}; choose from {', '.join(PARAMETERS)} (shape:tiny,layers=2,seed=1)"
        )
    least, most = PARAMETERS[key]
    if not (value.isascii() and value.isdecimal() and least <= int(value) <= most):
        raise ConfigError(f"model: {key} of a shape must be a number from {least} to {most}, found {value[:40]!r}")
    return key, int(value)


@cache
def _tokenizer_json(vocab_size: int) -> str:
    return tokenizer_json(vocab_size)


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
