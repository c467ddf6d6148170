"""Workers that hang, are late, lie or die while every expert has a replica: no request fails, no bit changes.

And the last replica: what its policy says happens, and the response says so.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import eq, lt
from pathlib import Path

import httpx
import pytest

from tests.chaos.test_router_faults import NEW_TOKENS, PROMPTS, load, undisturbed
from tests.integration.completions import Completion, await_metric, body_of, complete, metric
from tests.stack import Process, launch, wait_ready, worker_argv
from tests.tiny_models import save_mixtral

KILLS = int(os.environ.get("WORKER_KILLS", "10"))
ALL = "all"
SHARES = ("0,1,2", "3")  # every token has an expert of the first


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny")


class Deployment:
    """Workers that hold what they are told to, and gateways that know their addresses."""

    def __init__(self, model: Path, cleanup: ExitStack) -> None:
        self._model, self._cleanup = model, cleanup
        self.folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))

    def start_workers(self, *arguments: list[str]) -> list[Process]:
        """Side by side, from when they listen."""
        started = [launch([*each, "--model", str(self._model)], self.folder) for each in arguments]
        for worker in started:
            self._cleanup.callback(worker.stop, signal.SIGKILL)
        for worker in started:
            worker.wait_listening()
        return started

    def start_gateways(self, workers: list[Process], *settings: Mapping[str, object]) -> list[Process]:
        """One over the same workers for each of the `gateway:` sections."""
        endpoints = [part for each in workers for part in ("--group-endpoint", f"experts={each.address}")]
        started = []
        for number, section in enumerate(settings):
            file = self.folder / f"gateway-{number}.yaml"
            file.write_text("gateway:\n" + "".join(f"  {key}: {value}\n" for key, value in section.items()))
            argv = ["gateway", "--model", str(self._model), "--config", str(file), "--port", "0", "--threads", "1"]
            started.append(launch([*argv, *endpoints], self.folder))
            self._cleanup.callback(started[-1].stop, signal.SIGKILL)
        for gateway in started:
            gateway.wait_listening()
            wait_ready(gateway)
            await_metric(gateway.address, "worker_connected", partial(eq, len(workers)))
        return started


@pytest.fixture
def deployment(model: Path) -> Iterator[Deployment]:
    with ExitStack() as cleanup:
        yield Deployment(model, cleanup)


@contextmanager
def stopped(worker: Process) -> Iterator[None]:
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def again(worker: Process, experts: str = ALL) -> list[str]:
    """What starts a worker at the address of one that is gone."""
    return [*worker_argv(experts), "--port", worker.address.rsplit(":", 1)[1]]


def at_least_one(count: float) -> bool:
    return count >= 1


def test_hung_killed_again_and_again_and_two_at_once(deployment: Deployment) -> None:
    workers = deployment.start_workers(*[worker_argv(ALL)] * 3)
    (gateway,) = deployment.start_gateways(workers, {"audit": 0})
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with load(gateway, undisturbed(gateway)) as clients:
        for worker in workers[:2]:
            with stopped(worker):
                clients.goes_on()
            await_metric(gateway.address, "worker_connected", partial(eq, 3))
        assert metric(gateway.address, "worker_late_total") >= 1
        for turn in range(KILLS // 2):
            chance.shuffle(workers)
            time.sleep(chance.random() / 2)
            for worker in workers[:2]:
                worker.stop(signal.SIGKILL)
                if turn % 2 == 0:  # else both at once
                    clients.goes_on(2)
            clients.goes_on(2)
            workers[:2] = deployment.start_workers(*map(again, workers[:2]))
            await_metric(gateway.address, "worker_connected", partial(eq, 3))
            clients.goes_on(2)


def test_faulty_workers(deployment: Deployment) -> None:
    files = [deployment.folder / f"fault-{number}" for number in range(3)]
    flags = ["--port", "0", "--threads", "1", "--experts", ALL]
    faulty = [["tests.faulty_worker", str(file), *flags] for file in files]
    *bad, good = deployment.start_workers(*faulty, worker_argv(ALL))
    unlinked: dict[str, object] = {"audit": 0, "local_links": "false"}
    gateways = deployment.start_gateways([*bad[:1], good], {"audit": 0}, unlinked)
    for gateway in gateways:
        with load(gateway, undisturbed(gateway)) as clients:
            for fault, told in (("late", "worker_late_total"), ("garbage", "worker_failures_total")):
                files[0].write_text(fault)
                clients.goes_on()
                await_metric(gateway.address, told, at_least_one)
                files[0].unlink()
                await_metric(gateway.address, "worker_connected", partial(eq, 2))
    (gateway,) = deployment.start_gateways([*bad, good], {"audit": 1})
    with load(gateway, undisturbed(gateway)) as clients:
        for number, fault in enumerate(("nan", "another", "wrong")):
            files[number].write_text(fault)
            clients.goes_on()
            await_metric(gateway.address, "worker_ejected", partial(eq, number + 1))
            address = bad[number].address.removeprefix("grpc://")
            assert f"worker {address} gets no more frames" in gateway.log()


def test_the_last_replica(deployment: Deployment) -> None:
    first, last = deployment.start_workers(*[worker_argv(each) for each in SHARES])
    policies = ("fail", "local", "renormalise", "wait")
    gateways = deployment.start_gateways([first, last], *({"last_replica": policy} for policy in policies))
    answers = [complete(each.address, PROMPTS[1], NEW_TOKENS) for each in gateways]
    last.stop(signal.SIGKILL)
    for policy, gateway, expected in zip(policies, gateways, answers, strict=True):
        await_metric(gateway.address, "missing_experts", at_least_one)
        if policy == "wait":
            before = metric(gateway.address, "prompt_tokens_total")
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(ask, gateway, PROMPTS[1])
                await_metric(gateway.address, "prompt_tokens_total", partial(lt, before))  # it was taken
                deployment.start_workers(again(last, SHARES[1]))
                expected.assert_same(answered(answer.result(), policy))
        elif policy == "fail":
            refused = ask(gateway, PROMPTS[1])
            assert refused.status_code == 503
            assert "no worker holds experts 3" in refused.json()["error"]["message"]
        elif policy == "local":
            expected.assert_same(answered(ask(gateway, PROMPTS[1]), policy))
        else:
            prompt = [each + 1 for each in PROMPTS[1]]  # nothing of it is cached
            assert answered(ask(gateway, prompt), policy).finish_reason == "length"


def ask(gateway: Process, prompt: list[int]) -> httpx.Response:
    return httpx.post(f"{gateway.address}/v1/completions", json=body_of(prompt, NEW_TOKENS), timeout=60)


def answered(response: httpx.Response, policy: str) -> Completion:
    """The answer, which says what was done."""
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["consilium_last_replica"][policy] > 0
    found = Completion()
    found.add(response.json())
    return found
