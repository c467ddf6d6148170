"""The objects of one rendered overlay, and the look-ups that the rules share."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

REPOSITORY = Path(__file__).parents[3]
OVERLAYS = REPOSITORY / "k8s" / "overlays"
TOOLS = Path(sys.executable).parent  # scripts/system-setup.sh puts kubectl and kubernetes-validate beside python
_GENERATED_HASH = re.compile(r"-[a-z0-9]{10}$")
_UNITS = {"m": 1e-3, "": 1.0, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment, StatefulSet or Job."""

    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.manifest["spec"]
        return spec

    @property
    def pod(self) -> Manifest:
        pod: Manifest = self.spec["template"]["spec"]
        return pod

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.spec["template"]["metadata"].get("labels", {}))

    @property
    def containers(self) -> list[Manifest]:
        """Those that go on running, without the init containers."""
        return list(self.pod["containers"])

    @property
    def all_containers(self) -> list[Manifest]:
        return [*self.pod.get("initContainers", []), *self.containers]

    @property
    def runs_forever(self) -> bool:
        return self.kind != "Job"

    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        ports = (port for container in self.containers for port in container.get("ports", []))
        return {str(port.get("name", port["containerPort"])): int(port["containerPort"]) for port in ports}

    def port(self, reference: object) -> int | None:
        """The container port that a name or a number means, None where there is no such port."""
        ports = self.ports()
        return reference if reference in ports.values() and isinstance(reference, int) else ports.get(str(reference))


@dataclass(frozen=True, slots=True)
class Cluster:
    """All objects of one overlay, and the (kind, name) of those that its README tells the operator to create."""

    objects: list[Manifest]
    external: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    def of_kind(self, *kinds: str) -> list[Manifest]:
        """In the order in which they are written."""
        return [each for each in self.objects if each["kind"] in kinds]

    def find(self, kind: str, name: str) -> Manifest | None:
        """By the full name, or by the name without the hash that kustomize's generators append."""
        named = (each for each in self.of_kind(kind) if name in written_names(each))
        return next(named, None)

    def workloads(self) -> list[Workload]:
        return [Workload(each) for each in self.of_kind("Deployment", "StatefulSet", "Job")]

    def selected(self, selector: Manifest) -> list[Workload]:
        """The workloads whose pods a label selector chooses."""
        return [each for each in self.workloads() if matches(selector, each.labels)]

    def scalers(self, workload: Workload) -> list[Manifest]:
        """The autoscalers that own the workload's number of replicas."""
        return [each for each in self.of_kind(*SCALERS) if scale_target(each) == (workload.kind, workload.name)]

    def fewest_replicas(self, workload: Workload) -> int:
        """What the autoscaler goes down to, else the stated number, else 1."""
        bounds = [each["spec"].get(SCALERS[each["kind"]][0], 1) for each in self.scalers(workload)]
        return int(min(bounds)) if bounds else int(workload.spec.get("replicas", 1))


# Kinds of autoscalers, and where each states its lower and upper bound.
SCALERS = {
    "ScaledObject": ("minReplicaCount", "maxReplicaCount"),
    "HorizontalPodAutoscaler": ("minReplicas", "maxReplicas"),
}


def render(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = [str(TOOLS / "kubectl"), "kustomize", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"kustomize warns: {done.stderr}"  # of fields that a coming version takes away
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def title(manifest: Manifest) -> str:
    """`Kind/name`, for messages."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def written_names(manifest: Manifest) -> set[str]:
    """Its name, and the one it has in the sources where kustomize appended a hash."""
    name = str(manifest["metadata"]["name"])
    return {name, _GENERATED_HASH.sub("", name)}


def scale_target(scaler: Manifest) -> tuple[str, str]:
    """Kind and name of what an autoscaler scales."""
    reference = scaler["spec"]["scaleTargetRef"]
    return str(reference.get("kind", "Deployment")), str(reference["name"])


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """A label selector with matchLabels and matchExpressions; the empty one chooses everything."""
    plain = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return plain and all(_expression(each, labels) for each in selector.get("matchExpressions", []))


def _expression(expression: Manifest, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[str(expression["operator"])]


def quantity(text: object) -> float:
    """A Kubernetes quantity (`500m`, `2Gi`, 3) as a number."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match is not None, f"{text!r} is not a quantity"
    return float(match[1]) * _UNITS[match[2]]


def mounts(workload: Workload, container: Manifest) -> Iterator[tuple[Manifest, Manifest]]:
    """Each volume mount with its volume."""
    volumes = {each["name"]: each for each in workload.pod.get("volumes", [])}
    for mount in container.get("volumeMounts", []):
        if mount["name"] in volumes:
            yield mount, volumes[mount["name"]]
