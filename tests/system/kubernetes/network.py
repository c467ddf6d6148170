"""What the network policies let through, computed as the API defines it, against what is meant to get through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.system.kubernetes.manifests import Cluster, Manifest, Workload, matches

NAME = "app.kubernetes.io/name"
NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection: a pod by its labels and its namespace's, or an address outside of the cluster."""

    what: str
    labels: dict[str, str]
    namespace: str | None  # None is outside
    ports: dict[str, int]


PROMETHEUS = Peer("Prometheus", {NAME: "prometheus"}, "monitoring", {"web": 9090})
STRANGER = Peer("a pod of another namespace", {NAME: "gateway"}, "default", {"https": 443})
MONITORING = Peer("another pod of Prometheus' namespace", {NAME: "grafana"}, "monitoring", {})
NEIGHBOUR = Peer("another pod of this namespace", {NAME: "debug"}, "consilium", {"any": 8080})
DNS = Peer("the name server", {"k8s-app": "kube-dns"}, "kube-system", {"dns": 53, "dns-tcp": 53})
INTERNET = Peer("the internet", {}, None, {"https": 443, "http": 80})
UDP_PORTS = {"dns"}

OUTSIDE = (PROMETHEUS, MONITORING, STRANGER, DNS, INTERNET)
RESOLVING = ("gateway", "expert", "router", "redis", "fetch-model", NEIGHBOUR.what)

# Who may open connections to which port of whom, by app.kubernetes.io/name or as above; all else is refused.
MEANT = {
    ("gateway", "expert", "grpc"),
    ("gateway", "router", "grpc"),
    ("gateway", "redis", "redis"),
    ("expert", "router", "grpc"),
    ("expert", "expert", "grpc"),
    ("Prometheus", "router", "metrics"),
    ("Prometheus", "expert", "metrics"),
    ("fetch-model", "the internet", "https"),
    *((client.what, "gateway", "http") for client in OUTSIDE),
    *((pod, DNS.what, port) for pod in RESOLVING for port in DNS.ports),
}


def connections_are_as_meant(cluster: Cluster) -> Iterator[str]:
    """Every pair of ends and every port, one by one."""
    everybody = [*(_peer(each) for each in cluster.workloads()), NEIGHBOUR, *OUTSIDE]
    for source, target in itertools.permutations(everybody, 2):
        if not {source.what, target.what} <= {each.what for each in OUTSIDE}:
            for port in target.ports:
                meant = (_short(source), _short(target), port) in MEANT
                if _allowed(cluster, source, target, port) != meant:
                    yield f"{source.what} {'cannot' if meant else 'can'} reach port {port} of {target.what}"


def _peer(workload: Workload) -> Peer:
    return Peer(str(workload), workload.labels, workload.manifest["metadata"].get("namespace"), workload.ports())


def _short(peer: Peer) -> str:
    return peer.labels[NAME] if "/" in peer.what else peer.what


def _allowed(cluster: Cluster, source: Peer, target: Peer, port: str) -> bool:
    return _direction(cluster, "egress", source, target, target, port) and _direction(
        cluster, "ingress", target, source, target, port
    )


def _direction(cluster: Cluster, direction: str, subject: Peer, other: Peer, target: Peer, port: str) -> bool:
    """Whether the policies on ``subject`` allow it: all do when none selects it, else one of them must."""
    policies = [
        each
        for each in cluster.of_kind("NetworkPolicy")
        if each["metadata"].get("namespace") == subject.namespace
        and matches(each["spec"]["podSelector"], subject.labels)
        and direction.capitalize() in each["spec"]["policyTypes"]
    ]
    return not policies or any(
        _rule_allows(policy, rule, direction, other, target, port)
        for policy in policies
        for rule in policy["spec"].get(direction, [])
    )


def _rule_allows(policy: Manifest, rule: Manifest, direction: str, other: Peer, target: Peer, port: str) -> bool:
    ports = rule.get("ports")
    if ports and not any(_port_matches(each, target, port) for each in ports):
        return False
    peers = rule.get("from" if direction == "ingress" else "to")
    return not peers or any(_peer_matches(policy, each, other) for each in peers)


def _port_matches(rule: Manifest, target: Peer, port: str) -> bool:
    protocol = "UDP" if port in UDP_PORTS else "TCP"
    return rule.get("protocol", "TCP") == protocol and rule.get("port", port) in (port, target.ports[port])


def _peer_matches(policy: Manifest, rule: Manifest, other: Peer) -> bool:
    if "ipBlock" in rule:  # addresses of pods are in the private ranges, which the rule must leave out
        return other.namespace is None or "10.0.0.0/8" not in rule["ipBlock"].get("except", [])
    if other.namespace is None:
        return False
    if "namespaceSelector" in rule:
        if not matches(rule["namespaceSelector"], {NAMESPACE: other.namespace}):
            return False
    elif other.namespace != policy["metadata"].get("namespace"):
        return False
    return matches(rule.get("podSelector", {}), other.labels)
