"""Rules on what the programs in the pods make of their arguments, environment and mounted files.

The services' own parsers read them, so an unknown flag, key or variable is found here and not in a crash loop.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from unittest import mock

import expert_service.__main__
import gateway.__main__
import router_service.__main__
from consilium.config import Config, RouterConfig, split_endpoint
from consilium.default_model import delta
from consilium.errors import ConfigError
from consilium.tokens import GATEWAY, WORKER
from expert_service.selection import parse_selection
from tests.system.kubernetes.manifests import Cluster, Manifest, Workload, mounts, quantity

NUM_EXPERTS = delta.Delta.load(delta.FILE).num_experts
PARSERS = {
    "gateway": gateway.__main__.parse_arguments,
    "expert": expert_service.__main__.parse_arguments,
    "router": router_service.__main__.parse_arguments,
}
# The tokens that each needs: its own to show, and those of whom it is to know.
TOKENS = {"gateway": (GATEWAY,), "expert": (WORKER,), "router": (WORKER, GATEWAY)}


@dataclass(frozen=True, slots=True)
class Service:
    """A container that runs a gateway or a worker, and the configuration it ends up with."""

    workload: Workload
    container: Manifest
    role: str
    config: Config


def services(cluster: Cluster) -> list[Service]:
    """All that run with a configuration that can be loaded; for the others see :func:`configurations_load`."""
    found = []
    for workload, container, role in _programs(cluster):
        with contextlib.suppress(ConfigError):
            found.append(Service(workload, container, role, load(cluster, workload, container, role)))
    return found


def configurations_load(cluster: Cluster) -> Iterator[str]:
    """Every argument, key and variable is one that the service knows."""
    roles = set()
    for workload, container, role in _programs(cluster):
        roles.add(role)
        try:
            load(cluster, workload, container, role)
        except ConfigError as error:
            yield f"{workload}: {error}"
    for role in sorted(PARSERS.keys() - roles):
        yield f"no container runs `consilium {role}`"


def service_links_are_off(cluster: Cluster) -> Iterator[str]:
    """A Service named consilium-x gives every pod variables CONSILIUM_X_…, which are unknown keys."""
    for workload in cluster.workloads():
        if workload.pod.get("enableServiceLinks") is not False:
            yield f"{workload}: enableServiceLinks is not false"


def ports_are_the_configured_ones(cluster: Cluster) -> Iterator[str]:
    """The services listen where the pod says, and not only on the pod's own loopback address."""
    for each in services(cluster):
        host, listening = _listening(each)
        if host not in ("0.0.0.0", "::"):
            yield f"{each.workload}: listens on {host}, where no other pod and no probe reaches it"
        if each.workload.ports() != listening:
            yield f"{each.workload}: has the ports {each.workload.ports()}, its program listens on {listening}"


def _listening(service: Service) -> tuple[str, dict[str, int | None]]:
    """Host and ports."""
    config = service.config
    if service.role == "gateway":
        return config.gateway.host, {"http": config.gateway.port}
    section = config.worker if service.role == "expert" else config.router or RouterConfig()
    return section.host, {"grpc": section.port, "metrics": section.metrics_port}


def routers_are_found(cluster: Cluster) -> Iterator[str]:
    """Where gateways and workers look for the router there is a Service over it."""
    routers = [str(each.workload) for each in services(cluster) if each.role == "router"]
    for each in services(cluster):
        if each.role != "router" and each.config.router is not None and each.config.router.endpoint is not None:
            host, port = split_endpoint(each.config.router.endpoint)
            found = cluster.find("Service", host)
            chosen = cluster.selected({"matchLabels": found["spec"]["selector"]}) if found else []
            ports = [one["port"] for one in found["spec"]["ports"]] if found else []
            if [str(one) for one in chosen] != routers or port not in ports:
                yield f"{each.workload}: {each.config.router.endpoint} does not lead to the router"


def tokens_are_mounted(cluster: Cluster) -> Iterator[str]:
    """What listens to the network does not start without; each pod has the secrets that it needs, and no others."""
    for each in services(cluster):
        files = {role: file for role in (WORKER, GATEWAY) if (file := each.config.tokens.file_of(role)) is not None}
        if set(files) != set(TOKENS[each.role]):
            yield f"{each.workload}: has the tokens of {sorted(files) or 'nobody'}, needs {sorted(TOKENS[each.role])}"
        mounted = {mount["mountPath"]: volume for mount, volume in mounts(each.workload, each.container)}
        for role, file in files.items():
            secret = mounted.get(str(file.parent), {}).get("secret", {}).get("secretName", "")
            if not secret.startswith(f"{role}-token"):  # a generated one has a hash after its name
                yield f"{each.workload}: {file} is not in the Secret {role}-token"


def endpoints_are_headless_services(cluster: Cluster) -> Iterator[str]:
    """Each group's endpoint is a headless Service over the workers that know themselves under the group's name."""
    for each in services(cluster):
        for group, settings in each.config.experts.items() if each.role == "gateway" else ():
            for endpoint in settings.endpoints:
                host, port = split_endpoint(endpoint)
                yield from _endpoint_problems(cluster, f"experts.{group}.endpoint {endpoint}", group, host, port)


def _endpoint_problems(cluster: Cluster, what: str, group: str, host: str, port: int) -> Iterator[str]:
    service = next((each for each in cluster.of_kind("Service") if each["metadata"]["name"] == host), None)
    if service is None:
        yield f"{what}: there is no Service {host!r}"
        return
    if service["spec"].get("clusterIP") != "None":
        yield f"{what}: not headless, so the gateway sees one address, and one connection goes to one replica for ever"
    if port not in [each["port"] for each in service["spec"]["ports"]]:
        yield f"{what}: Service {host!r} has no such port"
    chosen = [str(each) for each in cluster.selected({"matchLabels": service["spec"]["selector"]})]
    members = [str(each.workload) for each in services(cluster) if each.role == "expert" and _member(each, group, port)]
    if chosen != members:
        yield f"{what}: leads to {chosen}, but workers of the group that listen on {port} are {members}"


def _member(service: Service, group: str, port: int) -> bool:
    return service.config.worker.group == group and service.config.worker.port == port


def every_worker_belongs_to_a_group(cluster: Cluster) -> Iterator[str]:
    """A worker refuses to start for a group that the file does not have."""
    for each in services(cluster):
        if each.role == "expert" and each.config.worker.group not in each.config.experts:
            yield f"{each.workload}: its group {each.config.worker.group!r} is not under experts:"


def every_expert_has_a_worker(cluster: Cluster) -> Iterator[str]:
    """The gateways are never ready while one is missing. Checked for the default model, whose size we know."""
    held: set[int] = set()
    for each in services(cluster):
        if each.role == "expert":
            if each.config.worker.layers != "all":
                yield f"{each.workload}: holds the layers {each.config.worker.layers} only"
            try:
                held |= set(parse_selection(each.config.worker.experts, "worker.experts", NUM_EXPERTS))
            except ConfigError as error:
                yield f"{each.workload}: {error}"
    missing = sorted(set(range(NUM_EXPERTS)) - held)
    if missing:
        yield f"no worker holds the experts {missing}"


def load(cluster: Cluster, workload: Workload, container: Manifest, role: str) -> Config:
    """The configuration of a container as its program would load it. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as complaints:
        arguments = [_local(cluster, workload, container, str(each), folder) for each in container.get("args", [])]
        environment = dict(environment_of(workload, container))
        try:
            with mock.patch.dict(os.environ, environment, clear=True):
                return PARSERS[role](arguments)
        except SystemExit:
            raise ConfigError(complaints.getvalue().strip().splitlines()[-1]) from None


def _programs(cluster: Cluster) -> Iterator[tuple[Workload, Manifest, str]]:
    for workload in cluster.workloads():
        for container in workload.containers:
            command = container.get("command", [])
            if command[:1] == ["consilium"] and command[1:] in [[role] for role in PARSERS]:
                yield workload, container, command[1]


def _local(cluster: Cluster, workload: Workload, container: Manifest, argument: str, folder: str) -> str:
    """The argument itself, or a copy on this machine of the mounted file that it names."""
    for mount, volume in mounts(workload, container):
        path = Path(argument)
        if "configMap" in volume and path.is_absolute() and path.is_relative_to(mount["mountPath"]):
            source = cluster.find("ConfigMap", volume["configMap"]["name"])
            content = (source or {}).get("data", {}).get(path.name)
            if content is not None:
                copy = Path(folder) / path.name
                copy.write_text(content, "utf-8")
                return str(copy)
    return argument


def environment_of(workload: Workload, container: Manifest) -> Iterator[tuple[str, str]]:
    """Names and values of the container's variables, with references followed and $(NAME) expanded."""
    known: dict[str, str] = {}
    for variable in container.get("env", []):
        text = variable["value"] if "value" in variable else _referred(workload, variable["valueFrom"])
        known[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda match: known.get(match[1], match[0]), text)
        yield variable["name"], known[variable["name"]]


def _referred(workload: Workload, source: Manifest) -> str:
    if "fieldRef" in source:
        match = re.fullmatch(r"metadata\.labels\['(.+)'\]", source["fieldRef"]["fieldPath"])
        return workload.labels.get(match[1], "") if match else ""
    if "resourceFieldRef" in source:
        reference = source["resourceFieldRef"]
        section, _, resource = reference["resource"].partition(".")
        container = next(each for each in workload.all_containers if each["name"] == reference["containerName"])
        return str(ceil(quantity(container["resources"].get(section, {}).get(resource, 0))))
    return "secret"  # what the operator chooses; that the reference resolves is another rule
