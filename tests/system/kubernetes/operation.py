"""Rules on how pods run: images, privileges, resources, probes, draining, rollouts, memory and threads."""

from __future__ import annotations

from collections.abc import Iterator

import expert_service.server
import expert_service.servicer
import gateway.engine_launch
import gateway.server
import gateway.worker_pool
import router_service.server
from tests.system.kubernetes.configuration import Service, services
from tests.system.kubernetes.manifests import Cluster, Manifest, quantity

# Seconds that a name may be cached: `ttl 30` in the CoreDNS configuration that kubeadm writes.
DNS_TTL = 30
# What a service needs after its drain time, at most: the last bytes, and for a gateway the end of its engine.
_AFTERWARDS = {
    "gateway": gateway.server._SECONDS_TO_SEND + gateway.engine_launch._SECONDS_TO_END,
    "expert": expert_service.server.CLOSING_SECONDS,
}
# Python, torch, the default model and what a step allocates, beside what the configuration says. Measured: the
# gateway's two processes 120 and 1020 MiB at their peak, a worker 650 MiB, a router 240 MiB.
_PROCESS_MEMORY = {"gateway": 2**30, "expert": 640 * 2**20, "router": 256 * 2**20}


def images_are_pinned(cluster: Cluster) -> Iterator[str]:
    """A tag that moves makes two replicas of one Deployment different programs."""
    for workload in cluster.workloads():
        for container in workload.all_containers:
            _, _, tag = container.get("image", "").rpartition("/")[2].partition(":")
            if tag in ("", "latest"):
                yield f"{workload}: the image of {container['name']} ({container.get('image')}) has no tag of its own"


def pods_are_unprivileged(cluster: Cluster) -> Iterator[str]:
    """What Kubernetes' `restricted` standard asks, and a read-only root file system and no token beside it."""
    for workload in cluster.workloads():
        pod = workload.pod
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{workload}: mounts a service account token"
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
            yield f"{workload}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{workload}: has not the default seccomp profile"
        for container in workload.all_containers:
            found = container.get("securityContext", {})
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if found != wanted:
                yield f"{workload}: the securityContext of {container['name']} is {found}"


def resources_are_stated(cluster: Cluster) -> Iterator[str]:
    """Requests for both, and a limit of the memory; requests are never above limits."""
    for workload in cluster.workloads():
        for container in workload.all_containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
                yield f"{workload}: {container['name']} does not state its requests and its memory limit"
            for name in requests.keys() & limits.keys():
                if quantity(requests[name]) > quantity(limits[name]):
                    yield f"{workload}: {container['name']} requests more {name} than its limit"


def probes_ask_open_ports(cluster: Cluster) -> Iterator[str]:
    """Every container that goes on has liveness and readiness probes, on ports that it has."""
    for workload in cluster.workloads():
        for container in workload.containers if workload.runs_forever else ():
            for kind in ("livenessProbe", "readinessProbe"):
                if kind not in container:
                    yield f"{workload}: {container['name']} has no {kind}"
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                for action in ("httpGet", "grpc", "tcpSocket"):
                    asked = container.get(kind, {}).get(action)
                    if asked is not None and workload.port(asked["port"]) is None:
                        yield f"{workload}: its {kind} asks port {asked['port']}, which it does not have"


def probes_ask_the_right_question(cluster: Cluster) -> Iterator[str]:
    """Liveness depends on no peer, readiness is apart from it, and loading is waited for."""
    live = {
        "gateway": {"httpGet": {"path": "/health", "port": "http"}},
        "expert": {"grpc": {"port": 50051}},
        "router": {"grpc": {"port": 50050}},
    }
    ready = {
        "gateway": {"httpGet": {"path": "/ready", "port": "http"}},
        "expert": {"grpc": {"port": 50051, "service": expert_service.servicer.SERVICE}},
        "router": {"grpc": {"port": 50050, "service": router_service.server.SERVICE}},
    }
    for each in services(cluster):
        for kind, wanted in (("startupProbe", live), ("livenessProbe", live), ("readinessProbe", ready)):
            probe = each.container.get(kind, {})
            asked = {action: probe[action] for action in ("httpGet", "grpc", "tcpSocket") if action in probe}
            if asked != wanted[each.role]:
                yield f"{each.workload}: its {kind} asks {asked}, not {wanted[each.role]}"
        startup = _patience(each.container.get("startupProbe", {}))
        if each.role == "expert" and startup < 300:
            yield f"{each.workload}: its startupProbe gives up after {startup} s, weights may take minutes to load"
        drain = _drain_timeout(each)
        if each.role == "expert" and _patience(each.container.get("livenessProbe", {})) <= drain:
            yield f"{each.workload}: NOT_SERVING for the {drain:g} s of a drain would count as dead"


def _on_the_token_path(cluster: Cluster) -> list[Service]:
    """All but the router, which may be away for a while, and computes no rows."""
    return [each for each in services(cluster) if each.role != "router"]


def _patience(probe: Manifest) -> int:
    """Seconds of failures after which the probe has failed."""
    return int(probe.get("periodSeconds", 10)) * int(probe.get("failureThreshold", 3))


def _drain_timeout(service: Service) -> float:
    config = service.config
    return config.gateway.drain_timeout if service.role == "gateway" else config.worker.drain_timeout


def pods_may_finish_draining(cluster: Cluster) -> Iterator[str]:
    """preStop, then the drain time, then the rest must fit between SIGTERM's announcement and SIGKILL."""
    for each in _on_the_token_path(cluster):
        pause = each.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = pause + _drain_timeout(each) + _AFTERWARDS[each.role]
        grace = each.workload.pod.get("terminationGracePeriodSeconds", 30)
        if pause <= 0:
            yield f"{each.workload}: no preStop pause, so requests are sent to it after it has closed"
        if needed >= grace:
            yield f"{each.workload}: is killed after {grace} s, but may need {needed:g} s to drain"


def rollouts_never_lack_an_expert(cluster: Cluster) -> Iterator[str]:
    """The new replica is known to every gateway before the old one goes."""
    needed = DNS_TTL + gateway.worker_pool.RESOLVE_INTERVAL
    for each in _on_the_token_path(cluster):
        strategy = each.workload.spec.get("strategy", {}).get("rollingUpdate", {})
        if strategy.get("maxUnavailable") != 0:
            yield f"{each.workload}: a rollout may take a replica away before another one is ready"
        waits = each.workload.spec.get("minReadySeconds", 0)
        if each.role == "expert" and waits < needed:
            yield f"{each.workload}: minReadySeconds is {waits}, but gateways may need {needed:g} s to find a replica"


def memory_suffices(cluster: Cluster) -> Iterator[str]:
    """The limit is above what the configuration lets the process take."""
    for each in services(cluster):
        needed = _configured_memory(each) + _PROCESS_MEMORY[each.role]
        limit = quantity(each.container.get("resources", {}).get("limits", {}).get("memory", 0))
        if limit < needed:
            yield f"{each.workload}: may take {needed / 2**20:.0f} MiB, its limit is {limit / 2**20:.0f} MiB"


def _configured_memory(service: Service) -> int:
    config = service.config
    if service.role == "router":
        return 0
    if service.role == "expert":
        frames = expert_service.server.QUEUED_FRAMES + expert_service.server.UNREAD_FRAMES
        return frames * config.worker.max_frame
    return config.gateway.kv_cache_memory + (config.cache.memory if config.cache else 0)


def threads_follow_the_cpu_limit(cluster: Cluster) -> Iterator[str]:
    """By default torch takes as many threads as the node has cores, and they are throttled together."""
    for each in _on_the_token_path(cluster):
        threads = each.config.gateway.threads if each.role == "gateway" else each.config.worker.threads
        limit = quantity(each.container.get("resources", {}).get("limits", {}).get("cpu", 0))
        if threads is None or not limit <= threads < limit + 1:
            yield f"{each.workload}: computes with {threads} threads on {limit:g} CPUs"
