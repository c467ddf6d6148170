"""Where configuration comes from: a YAML file, the environment, the command line; all become one tree of mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from consilium.errors import ConfigError

ENV_PREFIX = "CONSILIUM_"
# Variables with our prefix that are not configuration: where fetched models are kept.
ENV_RESERVED = frozenset({"CONSILIUM_CACHE"})

_MERGE_TAG = "tag:yaml.org,2002:merge"  # `<<` may stand twice


class _StrictLoader(yaml.SafeLoader):
    """YAML with every key once in its mapping; plain PyYAML silently keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return mapping


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in ``file``; an empty file is an empty one. Raises ConfigError that names the file and the line."""
    try:
        content = _load_yaml(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping at the top, for example `experts:`")
    return content


def read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str], Any]]:
    """Name, path and value of the variables that carry our prefix, by name; lists and mappings are read as YAML.

    Raises ConfigError that names the variable.
    """
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in ENV_RESERVED:
            text = environ[name]
            try:
                value = _load_yaml(text) if text.lstrip().startswith(("[", "{")) else text
            except ValueError as error:
                raise ConfigError(f"{name} is not valid YAML: {error}") from None
            yield name, name.removeprefix(ENV_PREFIX).lower().split("__"), value


def assign(tree: dict[str, Any], path: list[str], value: object) -> None:
    """Set a nested key. Raises ConfigError when a key on the way holds something other than a mapping."""
    for depth, key in enumerate(path[:-1], start=1):
        below = tree.get(key)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{'.'.join(path[:depth])}: must be a mapping, because {'.'.join(path)} is set too")
        tree[key] = dict(below or {})  # copied, so that no caller's value and no other alias in the YAML changes
        tree = tree[key]
    tree[path[-1]] = value


def _load_yaml(text: str) -> Any:
    """What ``text`` says. Raises ValueError without quoting the text, which may hold secrets."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(place + (error.problem or error.context or "malformed")) from None
    except (yaml.YAMLError, RecursionError):
        raise ValueError("it holds characters that YAML does not allow, or is nested too deeply") from None
