"""k8s/ as far as it can be proved without a cluster: rendered, against Kubernetes' schemas, and by rules of our own.

Needs kubectl, kubernetes-validate and the types of the custom resources: scripts/system-setup.sh installs them.
"""

from __future__ import annotations

import copy
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import consilium
from tests.system.kubernetes.custom_resources import is_custom
from tests.system.kubernetes.manifests import OVERLAYS, TOOLS, Cluster, Manifest, render
from tests.system.kubernetes.planted import PLANTED
from tests.system.kubernetes.planting import Planted
from tests.system.kubernetes.rules import RULES, problems

# What the overlay's head tells the operator to create.
SECRETS = frozenset(("Secret", name) for name in ("redis-auth", "worker-token", "gateway-token"))
OVERLAY_NEEDS = {"local": frozenset[tuple[str, str]](), "production": SECRETS}
# The oldest that has preStop's `sleep` by default, and the newest that the validator knows.
KUBERNETES_VERSIONS = ("1.30", "1.37")


@cache
def cluster_of(overlay: str) -> Cluster:
    return Cluster(render(overlay), OVERLAY_NEEDS[overlay])


def test_every_overlay_is_tested() -> None:
    assert {folder.name for folder in OVERLAYS.iterdir()} == OVERLAY_NEEDS.keys()


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAY_NEEDS)
def test_objects_match_kubernetes_schemas(overlay: str, version: str, tmp_path: Path) -> None:
    objects = cluster_of(overlay).objects
    passed, complaints = _validate(objects, version, tmp_path)
    # The validator only warns of kinds it does not know: those, and no others, have checks of their own.
    expected = Counter(each["kind"].lower() for each in objects if not is_custom(each))
    assert not complaints
    assert passed == expected
    assert passed["deployment"] == 5


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.template.spec.terminationGraceSeconds", 30),
        ("Deployment", "spec.template.spec.containers.0.readinessProbe.grpc.port", "grpc"),
        ("NetworkPolicy", "spec.ingres", []),
        ("PodDisruptionBudget", "spec.maxUnavailable", None),
        ("Service", "spec.ports.0.port", "http"),
    ],
)
def test_schema_errors_are_caught(kind: str, path: str, value: object, tmp_path: Path) -> None:
    (first, *_) = [each for each in cluster_of("production").objects if each["kind"] == kind]
    broken = Planted("", f"{kind}/{first['metadata']['name']}", path, value, "").apply(Cluster([copy.deepcopy(first)]))
    _, complaints = _validate(broken.objects, KUBERNETES_VERSIONS[-1], tmp_path)
    assert len(complaints) == 1


@pytest.mark.parametrize("overlay", OVERLAY_NEEDS)
def test_objects_fit_together(overlay: str) -> None:
    assert problems(cluster_of(overlay)) == []


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_planted_errors_are_caught(planted: Planted) -> None:
    (rule,) = [each for each in RULES if each.__name__ == planted.rule]
    found = list(rule(planted.apply(cluster_of("production"))))
    assert any(planted.says in problem for problem in found), found


def test_every_rule_has_a_planted_error() -> None:
    assert {each.__name__ for each in RULES} == {each.rule for each in PLANTED}


def test_local_runs_one_replica_of_each() -> None:
    cluster = cluster_of("local")
    assert {str(each): cluster.fewest_replicas(each) for each in cluster.workloads()} == {
        "Deployment/gateway": 1,
        "Deployment/experts-a": 1,
        "Deployment/experts-b": 1,
        "Deployment/redis": 1,
        "Deployment/router": 1,
        "Job/fetch-model": 1,
    }
    assert not cluster.of_kind("ScaledObject", "PodMonitor")


def test_production_scales_and_keeps_two_of_everything_that_computes() -> None:
    cluster = cluster_of("production")
    scaled = {each.name: cluster.fewest_replicas(each) for each in cluster.workloads() if cluster.scalers(each)}
    assert scaled == {"gateway": 2, "experts-a": 2, "experts-b": 2}
    assert not cluster.of_kind("HorizontalPodAutoscaler")  # KEDA makes them


def test_production_runs_this_version_from_a_registry() -> None:
    images = {
        container["image"]
        for workload in cluster_of("production").workloads()
        for container in workload.all_containers
        if "consilium" in container["image"]
    }
    tag = consilium.__version__
    assert images == {f"registry.example.com/consilium/{name}:{tag}" for name in ("gateway", "expert")}


def _validate(objects: list[Manifest], version: str, folder: Path) -> tuple[Counter[str], list[str]]:
    """How many objects of each kind passed, and what the validator has against the others."""
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects), "utf-8")
    command = [str(TOOLS / "kubernetes-validate"), "-k", version, "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    complaints = [line for line in lines if line.startswith(("ERROR", "FATAL"))]
    assert bool(complaints) == bool(done.returncode), done.stdout + done.stderr
    passed = [line.partition(" passed for resource ")[2].partition("/")[0] for line in lines if line.startswith("INFO")]
    return Counter(passed), complaints
