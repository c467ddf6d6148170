"""Rules on who refers to whom: namespaces, selectors, ports, references, monitors, network policies.

Each rule yields one sentence for every problem it finds.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from tests.system.kubernetes.manifests import REPOSITORY, Cluster, Manifest, Workload, matches, mounts, title

PROMETHEUS = REPOSITORY / "deploy" / "prometheus" / "prometheus.yml"
CLUSTER_WIDE = ("Namespace",)


def namespaces_agree(cluster: Cluster) -> Iterator[str]:
    """Everything is in the one namespace that is created here."""
    created = {each["metadata"]["name"] for each in cluster.of_kind("Namespace")}
    used = {each["metadata"].get("namespace") for each in cluster.objects if each["kind"] not in CLUSTER_WIDE}
    if len(created) != 1 or used != created:
        yield f"objects are in the namespaces {sorted(map(str, used))}, created are {sorted(created)}"


def names_are_unique(cluster: Cluster) -> Iterator[str]:
    """kustomize refuses equal names, but not two objects that differ only in the API version."""
    titles = [title(each) for each in cluster.objects]
    for each in sorted({each for each in titles if titles.count(each) > 1}):
        yield f"{each} stands twice"


def workloads_select_their_own_pods(cluster: Cluster) -> Iterator[str]:
    """Two workloads with overlapping selectors would adopt each other's pods."""
    for workload in cluster.workloads():
        if "selector" in workload.spec:
            chosen = [str(each) for each in cluster.selected(workload.spec["selector"])]
            if chosen != [str(workload)]:
                yield f"{workload}: its selector matches {chosen or 'no pods'}"


def services_reach_ports(cluster: Cluster) -> Iterator[str]:
    """Each Service selects the pods of one workload, and each of its ports is one of theirs."""
    for service in cluster.of_kind("Service"):
        chosen = cluster.selected({"matchLabels": service["spec"]["selector"]})
        if len(chosen) != 1:
            yield f"{title(service)}: its selector matches {len(chosen)} workloads, not one"
            continue
        for port in service["spec"]["ports"]:
            target = chosen[0].port(port.get("targetPort", port["port"]))
            if target is None:
                yield f"{title(service)}: {chosen[0]} has no port {port.get('targetPort', port['port'])}"
            elif service["spec"].get("clusterIP") == "None" and target != port["port"]:
                yield f"{title(service)}: headless, so port {port['port']} is not translated to {target}"


def references_resolve(cluster: Cluster) -> Iterator[str]:
    """ConfigMaps, Secrets (with their keys) and claims exist; mounts and volumes belong together."""
    for workload in cluster.workloads():
        mounted = set()
        for container in workload.all_containers:
            mounted |= {mount["name"] for mount, _ in mounts(workload, container)}
            for mount in container.get("volumeMounts", []):
                if all(mount["name"] != each["name"] for each in workload.pod.get("volumes", [])):
                    yield f"{workload}: {container['name']} mounts {mount['name']!r}, which is no volume of the pod"
            for variable in container.get("env", []):
                yield from _environment_problems(cluster, workload, variable)
        for volume in workload.pod.get("volumes", []):
            if volume["name"] not in mounted:
                yield f"{workload}: no container mounts the volume {volume['name']!r}"
            yield from _volume_problems(cluster, workload, volume)


def _environment_problems(cluster: Cluster, workload: Workload, variable: Manifest) -> Iterator[str]:
    source = variable.get("valueFrom", {})
    for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
        if field in source and not source[field].get("optional", False):
            yield from _missing(cluster, workload, kind, source[field]["name"], source[field]["key"])
    if "resourceFieldRef" in source:
        reference = source["resourceFieldRef"]
        named = [each for each in workload.all_containers if each["name"] == reference.get("containerName")]
        section, _, resource = str(reference["resource"]).partition(".")
        if not named or resource not in named[0].get("resources", {}).get(section, {}):
            yield f"{workload}: {variable['name']} refers to {reference}, which is not stated"


def _volume_problems(cluster: Cluster, workload: Workload, volume: Manifest) -> Iterator[str]:
    if "configMap" in volume:
        yield from _missing(cluster, workload, "ConfigMap", volume["configMap"]["name"])
    if "secret" in volume:
        yield from _missing(cluster, workload, "Secret", volume["secret"]["secretName"])
    if "persistentVolumeClaim" in volume:
        yield from _missing(cluster, workload, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])


def _missing(cluster: Cluster, workload: Workload, kind: str, name: str, key: str | None = None) -> Iterator[str]:
    if (kind, name) in cluster.external:
        return
    found = next((each for each in cluster.of_kind(kind) if each["metadata"]["name"] == name), None)
    if found is None:
        yield f"{workload}: there is no {kind} {name!r}"
    elif key is not None and key not in {**found.get("data", {}), **found.get("stringData", {})}:
        yield f"{workload}: {kind} {name!r} has no key {key!r}"


def generated_objects_are_used(cluster: Cluster) -> Iterator[str]:
    """A ConfigMap, Secret or claim that nothing refers to is a reference that went wrong elsewhere."""
    text = str([each.manifest for each in cluster.workloads()])
    for each in cluster.of_kind("ConfigMap", "Secret", "PersistentVolumeClaim"):
        if f"'{each['metadata']['name']}'" not in text:
            yield f"nothing refers to {title(each)}"


def monitors_find_ports(cluster: Cluster) -> Iterator[str]:
    """Each monitor selects pods that have the port it names, and all metrics are scraped once."""
    scraped: list[tuple[str, str]] = []
    for monitor in cluster.of_kind("PodMonitor"):
        chosen = cluster.selected(monitor["spec"]["selector"])
        if not chosen:
            yield f"{title(monitor)}: its selector matches no pods"
        for workload in chosen:
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                scraped.append((str(workload), endpoint["port"]))
                if endpoint["port"] not in workload.ports():
                    yield f"{title(monitor)}: {workload} has no port named {endpoint['port']!r}"
    for each in sorted({each for each in scraped if scraped.count(each) > 1}):
        yield f"{each[0]}: its port {each[1]} is scraped twice"


def monitors_name_jobs_as_the_alerts_do(cluster: Cluster) -> Iterator[str]:
    """Alerts and dashboards choose by `job`, which Prometheus without the operator has from its own file."""
    expected = {each["job_name"] for each in yaml.safe_load(PROMETHEUS.read_text("utf-8"))["scrape_configs"]}
    found = {
        relabeling.get("replacement")
        for monitor in cluster.of_kind("PodMonitor")
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint.get("relabelings", [])
        if relabeling["targetLabel"] == "job"
    }
    if cluster.of_kind("PodMonitor") and found != expected:
        yield f"pods are scraped as the jobs {sorted(map(str, found))}, alerts know {sorted(expected)}"


def policies_select_pods(cluster: Cluster) -> Iterator[str]:
    """No policy, and no peer within the namespace, that matches nothing; no port name that no pod has."""
    for policy in cluster.of_kind("NetworkPolicy"):
        if not cluster.selected(policy["spec"]["podSelector"]):
            yield f"{title(policy)}: its podSelector matches no pods"
        for direction, side in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, []):
                yield from _peer_problems(cluster, policy, rule, side)


def _peer_problems(cluster: Cluster, policy: Manifest, rule: Manifest, side: str) -> Iterator[str]:
    peers = [each for each in rule.get(side, []) if "podSelector" in each and "namespaceSelector" not in each]
    for peer in peers:
        if not cluster.selected(peer["podSelector"]):
            yield f"{title(policy)}: the peer {peer['podSelector']} matches no pods"
    targets = [policy["spec"]["podSelector"]] if side == "from" else [each["podSelector"] for each in peers]
    pods = [each for each in cluster.workloads() for target in targets if matches(target, each.labels)]
    for port in rule.get("ports", []):
        if isinstance(port.get("port"), str) and any(port["port"] not in each.ports() for each in pods):
            yield f"{title(policy)}: names the port {port['port']!r}, which not all pods it is about have"
