"""Workers behind links of their own, under load: connections cut, and links that lose every packet and say nothing.

No request fails, no bit changes: a replica answers. Needs root, and iproute2.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import eq

import pytest
import yaml

from tests.chaos.test_router_faults import Load, load, undisturbed
from tests.integration.completions import Completion, await_metric, metric
from tests.stack import START_SECONDS, Process, launch, running, wait_ready, worker_argv
from tests.system.namespace import Namespace, joined
from tests.system.prometheus import wait_for
from tests.tiny_models import save_mixtral

WORKERS = 3
ATTEMPT = "1s"  # after which a gateway takes a worker that does not answer for gone


@dataclass(frozen=True)
class Deployment:
    """Workers in namespaces, each with every expert, and a gateway out here."""

    hosts: list[Namespace]
    gateway: Process
    expected: list[Completion]

    def await_connected(self, workers: int) -> None:
        await_metric(self.gateway.address, "worker_connected", partial(eq, workers))

    def cut(self, host: Namespace) -> None:
        """Reset its connections, and return when it has others."""
        before = host.cut()
        assert before
        while not (now := host.peers()) or now & before:
            assert self.gateway.popen.poll() is None
            time.sleep(0.02)
        self.await_connected(WORKERS)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model, folder = save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny"), tmp_path_factory.mktemp("cut")
    token, config = folder / "token", folder / "consilium.yaml"
    token.write_text("the-word-of-a-gateway")
    with ExitStack() as cleanup:
        hosts = [cleanup.enter_context(joined(number)) for number in range(WORKERS)]
        workers = list[Process]()
        for host in hosts:
            argv = worker_argv("all", "--model", str(model), "--host", host.theirs)
            environment = ("env", f"CONSILIUM_TOKENS__GATEWAY_FILE={token}")
            workers.append(launch(argv, folder, prefix=(*host.inside, *environment)))
            cleanup.callback(workers[-1].stop, signal.SIGKILL)
        for worker in workers:
            worker.wait_listening()
        group = {"endpoint": [worker.address for worker in workers], "timeout": ATTEMPT}
        config.write_text(yaml.safe_dump({"experts": {"experts": group}, "tokens": {"gateway_file": str(token)}}))
        argv = ["gateway", "--model", str(model), "--config", str(config), "--port", "0", "--threads", "1"]
        gateway = cleanup.enter_context(running(argv, folder))
        wait_ready(gateway)
        found = Deployment(hosts, gateway, wait_for(lambda: answers(gateway), START_SECONDS))
        found.await_connected(WORKERS)
        yield found


def answers(gateway: Process) -> list[Completion]:
    """None until there are: a kernel that is not compiled yet may take longer than an attempt."""
    found = undisturbed(gateway)
    return [] if any(each.error for each in found) else found


@pytest.fixture
def clients(deployment: Deployment, findings: list[str], request: pytest.FixtureRequest) -> Iterator[Load]:
    with load(deployment.gateway, deployment.expected) as clients:
        yield clients
    findings.append(f"{request.node.name}: {clients.told}")


def test_connections_are_cut_one_worker_after_the_other(deployment: Deployment, clients: Load) -> None:
    for host in 2 * deployment.hosts:
        deployment.cut(host)
        clients.goes_on(2)


def test_a_link_is_silent_for_a_moment(deployment: Deployment, clients: Load) -> None:
    for host in deployment.hosts:
        asked = metric(deployment.gateway.address, "worker_hedges_total")
        host.unplug()
        clients.goes_on(2)
        host.plug_in()
        clients.goes_on()
        assert metric(deployment.gateway.address, "worker_hedges_total") > asked
        deployment.await_connected(WORKERS)


def test_a_link_is_silent_until_the_worker_counts_as_gone_and_comes_back(deployment: Deployment, clients: Load) -> None:
    host = deployment.hosts[0]
    host.unplug()
    deployment.await_connected(WORKERS - 1)
    clients.goes_on()
    host.plug_in()
    deployment.await_connected(WORKERS)


def test_one_is_silent_and_another_one_cut(deployment: Deployment, clients: Load) -> None:
    silent, other, _ = deployment.hosts
    silent.unplug()
    assert other.cut()
    clients.goes_on()
    silent.plug_in()
    clients.goes_on()
    deployment.await_connected(WORKERS)
