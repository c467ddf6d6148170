"""Rules on numbers of replicas: autoscalers and what they ask, disruption budgets, spreading."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.system.kubernetes.manifests import SCALERS, Cluster, matches, scale_target, title
from tests.system.kubernetes.metrics import metric_names


def budgets_leave_room(cluster: Cluster) -> Iterator[str]:
    """Each budget covers one workload, lets a pod go, and keeps one where there are several."""
    for budget in cluster.of_kind("PodDisruptionBudget"):
        spec = budget["spec"]
        chosen = cluster.selected(spec["selector"])
        if len(chosen) != 1:
            yield f"{title(budget)}: its selector matches {len(chosen)} workloads, not one"
            continue
        replicas = cluster.fewest_replicas(chosen[0])
        if not all(isinstance(spec.get(each, 0), int) for each in ("minAvailable", "maxUnavailable")):
            yield f"{title(budget)}: state numbers, percentages of few replicas round in surprising ways"
            continue
        stays = spec["minAvailable"] if "minAvailable" in spec else replicas - spec["maxUnavailable"]
        if stays >= replicas:
            yield f"{title(budget)}: {stays} of {replicas} replicas must stay, so no node can be drained"
        elif replicas > 1 and stays < 1:
            yield f"{title(budget)}: all {replicas} replicas may be evicted at once"


def replicas_have_a_budget(cluster: Cluster) -> Iterator[str]:
    """What has several replicas has them in order to lose one, not two."""
    for workload in cluster.workloads():
        budgets = [each["spec"]["selector"] for each in cluster.of_kind("PodDisruptionBudget")]
        if cluster.fewest_replicas(workload) > 1 and not any(matches(each, workload.labels) for each in budgets):
            yield f"{workload}: has several replicas and no PodDisruptionBudget"


def spreads_count_their_own_pods(cluster: Cluster) -> Iterator[str]:
    """A constraint that counts other pods spreads nothing."""
    for workload in cluster.workloads():
        for constraint in workload.pod.get("topologySpreadConstraints", []):
            if [str(each) for each in cluster.selected(constraint["labelSelector"])] != [str(workload)]:
                yield f"{workload}: spreads over {constraint['topologyKey']} what is not exactly its own pods"


def replicas_spread(cluster: Cluster) -> Iterator[str]:
    """Several replicas on one node, or all in one zone, fall together."""
    for workload in cluster.workloads():
        keys = {each["topologyKey"] for each in workload.pod.get("topologySpreadConstraints", [])}
        if cluster.fewest_replicas(workload) > 1 and keys != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
            yield f"{workload}: has several replicas and does not spread them over nodes and zones"


def autoscalers_own_their_target(cluster: Cluster) -> Iterator[str]:
    """Each target exists, has one owner of its replicas, and never goes to none."""
    for scaler in cluster.of_kind(*SCALERS):
        low, high = (scaler["spec"].get(each, 0) for each in SCALERS[scaler["kind"]])
        if not 1 <= low < high:
            yield f"{title(scaler)}: scales from {low} to {high}; the experts of a group at 0 are nowhere"
        kind, name = scale_target(scaler)
        target = next((each for each in cluster.workloads() if (each.kind, each.name) == (kind, name)), None)
        if target is None:
            yield f"{title(scaler)}: there is no {kind} {name!r}"
        elif "replicas" in target.spec:
            yield f"{target}: states replicas, and every apply would undo what {title(scaler)} has set"
    for workload in cluster.workloads():
        if len(cluster.scalers(workload)) > 1:
            yield f"{workload}: several autoscalers: {[title(each) for each in cluster.scalers(workload)]}"


def queries_are_about_this_cluster(cluster: Cluster) -> Iterator[str]:
    """A query with another namespace or group in it scales by somebody else's load."""
    for scaler in cluster.of_kind("ScaledObject"):
        namespace = scaler["metadata"].get("namespace")
        for trigger in scaler["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            if f'namespace="{namespace}"' not in query:
                yield f"{title(scaler)}: its query does not ask for the namespace {namespace!r}"
            if "group=" in query and f'group="{scale_target(scaler)[1]}"' not in query:
                yield f"{title(scaler)}: its query asks for another group than {scale_target(scaler)[1]!r}"


def queries_name_metrics_that_exist(cluster: Cluster) -> Iterator[str]:
    """Prometheus answers a query for a metric that nobody has with nothing."""
    for scaler in cluster.of_kind("ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            for name in re.findall(r"consilium_\w+", trigger["metadata"]["query"]):
                if name not in metric_names():
                    yield f"{title(scaler)}: its query asks for {name}, which no service has"
