"""Strict checks of custom resources, which kubernetes-validate has no schemas for.

The types are generated from the projects' own definitions (PyPI: cloudcoil-models-*). They ignore fields they do not
know, so what comes out is compared with what went in.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from tests.system.kubernetes.manifests import Cluster, Manifest, title

MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
    ("monitoring.coreos.com/v1", "PodMonitor"): "cloudcoil.models.prometheus_operator.v1",
}
# The parameters of a trigger are free text to the definition; these are KEDA's for Prometheus.
TRIGGER_TYPES = {"prometheus": {"serverAddress", "query", "threshold", "ignoreNullValues"}}


def is_custom(manifest: Manifest) -> bool:
    """Whether the checks here are for it."""
    return (manifest["apiVersion"], manifest["kind"]) in MODELS


def custom_resources_are_valid(cluster: Cluster) -> Iterator[str]:
    """Types, required fields, no unknown fields."""
    for manifest in filter(is_custom, cluster.objects):
        module = importlib.import_module(MODELS[manifest["apiVersion"], manifest["kind"]])
        try:
            parsed = getattr(module, manifest["kind"]).model_validate(manifest)
        except ValueError as error:
            yield f"{title(manifest)}: {error}"
            continue
        known = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for path in _lost(manifest, known):
            yield f"{title(manifest)}: unknown field {path}"


def triggers_are_valid(cluster: Cluster) -> Iterator[str]:
    """Known type and parameters, all of them text, an average over the replicas, and no data is not a zero."""
    for scaler in cluster.of_kind("ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            metadata = trigger["metadata"]
            if metadata.keys() != TRIGGER_TYPES.get(trigger["type"]):
                yield f"{title(scaler)}: trigger {trigger['type']} with the parameters {sorted(metadata)}"
                continue
            if not float(metadata["threshold"]) > 0:
                yield f"{title(scaler)}: threshold {metadata['threshold']}"
            if trigger.get("metricType", "AverageValue") != "AverageValue":
                yield f"{title(scaler)}: metricType {trigger['metricType']} does not divide by the number of replicas"
            if metadata["ignoreNullValues"] != "false":
                yield f"{title(scaler)}: would scale down while Prometheus has no data"


def _lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Paths that are in ``given`` and not in ``kept``."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            below = f"{path}.{key}".lstrip(".")
            yield from _lost(value, kept[key], below) if key in kept else [below]
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield f"{path} (read as {kept!r})"
