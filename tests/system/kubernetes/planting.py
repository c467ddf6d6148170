"""Planting an error: one edit of rendered manifests, and what the rule that it breaks is to say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.system.kubernetes.manifests import Cluster, Manifest, written_names

REMOVED = object()


@dataclass(frozen=True, slots=True)
class Planted:
    """One edit, the rule that it breaks, and what that rule is to say."""

    rule: str
    where: str  # Kind/name
    path: str | tuple[str, ...]  # keys and indices, dotted where no key has a dot
    value: Any  # the new value, REMOVED, or a function of the old one
    says: str

    def __str__(self) -> str:
        path = self.path if isinstance(self.path, str) else ".".join(self.path)
        return f"{self.rule}-{self.where}-{path}"

    def apply(self, cluster: Cluster) -> Cluster:
        """A copy of the cluster with the error in it."""
        objects = copy.deepcopy(cluster.objects)
        kind, _, name = self.where.partition("/")
        (place,) = [each for each in objects if each["kind"] == kind and name in written_names(each)]
        keys = self.path.split(".") if isinstance(self.path, str) else list(self.path)
        _edit(place, keys, self.value)
        return Cluster(objects, cluster.external)


def _edit(place: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    last: Any = int(keys[-1]) if isinstance(place, list) else keys[-1]
    if value is REMOVED:
        del place[last]
    elif callable(value):
        new = value(place[last])
        assert new != place[last], f"nothing planted at {keys}"
        place[last] = new
    else:
        place[last] = value


def replace(old: str, new: str) -> Callable[[str], str]:
    """Another text."""
    return lambda text: text.replace(old, new)


def add(item: Any) -> Callable[[list[Any]], list[Any]]:
    """One item more."""
    return lambda items: [*items, item]


def drop(key: str, value: object) -> Callable[[list[Manifest]], list[Manifest]]:
    """Without the items that have this value under this key."""
    return lambda items: [each for each in items if each.get(key) != value]


def variable(name: str, value: str) -> Callable[[list[Any]], list[Any]]:
    """One environment variable more."""
    return add({"name": name, "value": value})
