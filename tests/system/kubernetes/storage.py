"""Rules on what is stored: weights on their volume, and the cache server's memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from consilium.models import FETCHABLE
from tests.system.kubernetes.configuration import environment_of, services
from tests.system.kubernetes.manifests import Cluster, Manifest, Workload, mounts, quantity

_REDIS_UNITS = {"kb": 2**10, "mb": 2**20, "gb": 2**30}


def weights_are_read_only(cluster: Cluster) -> Iterator[str]:
    """What runs on may read volumes that outlive it, never write them."""
    for workload in cluster.workloads():
        for container in workload.all_containers if workload.runs_forever else ():
            for mount, volume in mounts(workload, container):
                if "persistentVolumeClaim" in volume and not mount.get("readOnly", False):
                    yield f"{workload}: {container['name']} may write the volume {volume['name']!r}"


def a_job_fetches_the_model(cluster: Cluster) -> Iterator[str]:
    """It writes to the claim, at the path, in which services look for a model that is named and not a path."""
    jobs = [each for each in cluster.workloads() if not each.runs_forever]
    fetched = [(c["command"][1:], _cache(job, c)) for job in jobs for c in job.containers]
    for each in services(cluster):
        wanted = (["model", "fetch", each.config.model], _cache(each.workload, each.container))
        if each.config.model in FETCHABLE and wanted not in fetched:
            yield f"{each.workload}: nothing puts the model {each.config.model!r} where it looks for it, {wanted[1]}"


def _cache(workload: Workload, container: Manifest) -> tuple[str | None, str | None]:
    """The folder of fetched models, and the claim of the volume that is mounted there."""
    folder = dict(environment_of(workload, container)).get("CONSILIUM_CACHE")
    volumes = [volume for mount, volume in mounts(workload, container) if mount["mountPath"] == folder]
    return folder, volumes[0].get("persistentVolumeClaim", {}).get("claimName") if volumes else None


def volumes_can_be_shared(cluster: Cluster) -> Iterator[str]:
    """A claim of one node is enough for pods of one node only: fine without spreading, not with several replicas."""
    for claim in cluster.of_kind("PersistentVolumeClaim"):
        name, modes = claim["metadata"]["name"], claim["spec"]["accessModes"]
        users = [each for each in cluster.workloads() if each.runs_forever and _claims(each, name)]
        if any(cluster.fewest_replicas(each) > 1 for each in users) and not {"ReadWriteMany"} & set(modes):
            yield f"PersistentVolumeClaim/{name}: {modes}, but replicas on several nodes mount it"


def _claims(workload: Workload, name: str) -> bool:
    volumes = workload.pod.get("volumes", [])
    return any(each.get("persistentVolumeClaim", {}).get("claimName") == name for each in volumes)


def redis_is_a_cache(cluster: Cluster) -> Iterator[str]:
    """Bounded below its memory limit, evicting, never writing to disk, with an access list."""
    for workload in cluster.workloads():
        for container in workload.containers:
            if container.get("command") == ["redis-server"]:
                settings = redis_settings(cluster, workload, container)
                limit = quantity(container.get("resources", {}).get("limits", {}).get("memory", 0))
                # its own tables, the clients' buffers and fragmentation: half as much again
                if not 0 < 1.4 * _redis_bytes(settings.get("maxmemory", "0")) <= limit:
                    yield f"{workload}: maxmemory {settings.get('maxmemory')} leaves no room in {limit / 2**20:.0f} MiB"
                for key, value in (("maxmemory-policy", "allkeys-lfu"), ("save", '""'), ("appendonly", "no")):
                    if settings.get(key) != value:
                        yield f"{workload}: {key} is {settings.get(key)}, not {value}"
                if "aclfile" not in settings:
                    yield f"{workload}: has no aclfile, so anybody may do anything"


def redis_settings(cluster: Cluster, workload: Workload, container: Manifest) -> dict[str, str]:
    """The configuration file, with the command line on top as redis-server takes it."""
    arguments = [str(each) for each in container["args"]]
    lines: list[str] = []
    for _, volume in mounts(workload, container):
        if "configMap" in volume:
            found = cluster.find("ConfigMap", volume["configMap"]["name"])
            lines += (found or {}).get("data", {}).get(arguments[0].rpartition("/")[2], "").splitlines()
    lines += [f"{key[2:]} {value}" for key, value in zip(arguments[1::2], arguments[2::2], strict=True)]
    return dict(re.split(r"\s+", line.strip(), maxsplit=1) for line in lines if line.strip() and line[0] != "#")


def _redis_bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].lower()
    return int(number) * _REDIS_UNITS[unit] if unit in _REDIS_UNITS else int(text)


def gateways_reach_their_cache(cluster: Cluster) -> Iterator[str]:
    """The URL leads to a Service, under a user that the access list lets in."""
    for each in services(cluster):
        cache = each.config.cache
        if each.role == "gateway" and cache is not None and cache.redis is not None:
            url = urlsplit(cache.redis.get_secret_value())
            found = cluster.find("Service", url.hostname or "")
            ports = [port["port"] for port in found["spec"]["ports"]] if found else []
            if (url.port or 6379) not in ports:
                yield f"{each.workload}: cache.redis leads to {url.hostname}:{url.port}, which is no Service's port"
            elif found and url.username not in _redis_users(cluster, found):
                yield f"{each.workload}: cache.redis names the user {url.username!r}, which the access list does not"


def _redis_users(cluster: Cluster, service: Manifest) -> set[str]:
    chosen = cluster.selected({"matchLabels": service["spec"]["selector"]})
    scripts = [str(c.get("args")) for workload in chosen for c in workload.pod.get("initContainers", [])]
    return {name for script in scripts for name in re.findall(r"user (\w+) on ", script)}
