"""Workers killed, added, replaced and sent away, router, Redis and a gateway killed, under load.

No request fails, no bit changes: every answer is compared with those of the start. One deployment goes through it all,
in the order of the file.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from consilium.router_status import summary
from tests.integration.completions import Completion, body_of, complete, events
from tests.integration.test_registration import save_other_weights, settled, states
from tests.integration.test_router_service import Caller, argv, calling
from tests.stack import Process, launch, running, wait_ready, worker_argv
from tests.tiny_models import save_mixtral
from tests.valkey import valkey

PROMPTS = [[(7 * i + 13 * n) % 380 + 2 for i in range(length)] for n, length in enumerate((3, 40, 17))]
NEW_TOKENS = 24
KILLS = int(os.environ.get("ROUTER_KILLS", "3"))  # more of them in a long run
ABSENCE = float(os.environ.get("ROUTER_ABSENCE", "0"))  # seconds without a router, at least
SETTINGS = {"CONSILIUM_ROUTER__LEASE": "2s", "CONSILIUM_ROUTER__GATEWAY_LEASE": "3s"}
ENOUGH = 6  # answers that say the load goes on


@dataclass
class Load:
    """Clients that ask without a pause, and compare every answer with what was answered before anything happened."""

    url: str
    expected: list[Completion]
    answers: int = 0
    errors: list[object] = field(default_factory=list)
    told: str = ""  # at the end, in a sentence
    _stall: float = 0.0  # the longest time without anything new, in seconds
    _lap: tuple[float, int] = field(default_factory=lambda: (time.monotonic(), 0))  # its begin, and answers until then
    _more: threading.Condition = field(default_factory=threading.Condition)

    def ask(self, stopping: threading.Event, turn: int) -> None:
        while not stopping.is_set():
            turn = (turn + 1) % len(PROMPTS)
            try:
                answer = self._stream(PROMPTS[turn])
                assert answer.error is None, answer.error
                answer.assert_same(self.expected[turn])
            except Exception as error:  # told by the test's own thread
                self.errors.append(error)
            with self._more:
                self.answers += 1
                self._more.notify_all()

    def _stream(self, prompt: list[int]) -> Completion:
        answer, last = Completion(), time.monotonic()
        for event in events(self.url, body_of(prompt, NEW_TOKENS, stream=True)):
            answer.add(event)
            now = time.monotonic()
            self._stall, last = max(self._stall, now - last), now
        return answer

    def goes_on(self, answers: int = ENOUGH) -> None:
        """Return after so many more answers, all of them right."""
        with self._more:
            wanted = self.answers + answers
            assert self._more.wait_for(lambda: self.answers >= wanted, 60)
        assert not self.errors, self.errors

    def lap(self) -> str:
        """What clients got since the last one, or the begin."""
        begun, answers = self._lap
        self._lap, stall = (time.monotonic(), self.answers), self._stall
        self._stall = 0.0
        rate = (self.answers - answers) / (self._lap[0] - begun)
        return f"{rate:.1f} answers/s, longest stall {stall * 1e3:.0f} ms"


def undisturbed(gateway: Process) -> list[Completion]:
    return [complete(gateway.address, prompt, NEW_TOKENS) for prompt in PROMPTS]


@contextmanager
def load(gateway: Process, expected: list[Completion]) -> Iterator[Load]:
    clients, stopping = Load(gateway.address, expected), threading.Event()
    threads = [threading.Thread(target=clients.ask, args=(stopping, turn)) for turn in range(2)]
    for thread in threads:
        thread.start()
    try:
        clients.goes_on()
        calm = clients.lap()
        yield clients
        clients.goes_on()
        disturbed = clients.lap()
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60)
    clients.told = f"{clients.answers} answers, {len(clients.errors)} failed or changed; {disturbed}; before it {calm}"
    print(clients.told)
    assert not clients.errors, clients.errors


class Deployment:
    """A router with a Redis of its own, workers that joined it with nothing, a gateway that knows only the router."""

    def __init__(self, model: Path, cleanup: ExitStack) -> None:
        self.model, self._cleanup = model, cleanup
        self.redis = cleanup.enter_context(valkey("--maxmemory-policy", "noeviction"))
        self._port = 0
        self.router: Process
        self.caller: Caller
        self.start_router(1)
        self.workers = self.add_workers(2)
        self.settle(2)
        self.gateway = self.start_gateway()
        self.expected = undisturbed(self.gateway)

    def start_router(self, replicas: int) -> None:
        """On the port that it had before."""
        with pytest.MonkeyPatch.context() as environment:
            redis = {"CONSILIUM_ROUTER__REDIS": self.redis.url}
            environment.setattr("tests.stack._environment", lambda: {**os.environ, **SETTINGS, **redis})
            settings = argv(self.model, "--replicas", str(replicas), "--port", str(self._port))
            self.router = self._cleanup.enter_context(running(settings))
        self._port = int(self.router.address.rsplit(":", 1)[1])
        self.caller = self._cleanup.enter_context(calling(self.router, self.model))

    def add_workers(self, count: int) -> list[Process]:
        """Workers that start side by side, from when they listen."""
        started = [launch(self.worker(self.model)) for _ in range(count)]
        for worker in started:
            self._cleanup.callback(worker.stop, signal.SIGKILL)
        for worker in started:
            worker.wait_listening()
        return started

    def worker(self, model: Path, experts: str = "all") -> list[str]:
        metrics = ("--metrics-port", "0")
        return worker_argv(experts, "--model", str(model), "--join", self.router.address, "--speed", "1", *metrics)

    def start_gateway(self) -> Process:
        common = ["--model", str(self.model), "--router", self.router.address]
        gateway = self._cleanup.enter_context(running(["gateway", *common, "--port", "0", "--threads", "1"]))
        wait_ready(gateway)
        return gateway

    def settle(self, workers: int) -> None:
        """Return when so many workers hold what they shall, and that is everything."""
        states(self.caller, settled(workers))

    def leave(self, worker: Process) -> None:
        """It gets SIGTERM, and leaves in time without taking anything along."""
        self.workers.remove(worker)
        assert worker.stop() == 0
        assert "nobody else holds" not in worker.log()
        assert "has not said" not in worker.log()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with ExitStack() as cleanup:
        yield Deployment(save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny"), cleanup)


def test_from_two_workers_to_four_and_back(deployment: Deployment) -> None:
    """With one copy of every expert: whoever leaves has last copies."""
    with load(deployment.gateway, deployment.expected) as clients:
        first = list(deployment.workers)
        deployment.workers += deployment.add_workers(2)
        deployment.settle(4)
        clients.goes_on()
        for worker in first:
            deployment.leave(worker)
            clients.goes_on()
        deployment.settle(2)


def test_wrong_weights_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    with load(deployment.gateway, deployment.expected):
        wrong = launch(deployment.worker(save_other_weights(deployment.model, tmp_path / "other"), "0"))
        assert wrong.wait() == 1
        # Of a layer where the worker that the router looks at first holds expert 0, too.
        assert re.search(r"refused: its weights of expert 0 of layer \d have the hash", wrong.log())
        assert "Traceback" not in wrong.log()


def test_without_redis_and_without_a_router(deployment: Deployment) -> None:
    with load(deployment.gateway, deployment.expected) as clients:
        deployment.redis.kill()
        clients.goes_on()
        deployment.redis.start()
        while "leases were lost" not in deployment.router.log():
            assert deployment.router.popen.poll() is None
            time.sleep(0.02)
        clients.goes_on()
        deployment.settle(2)
        deployment.router.stop(signal.SIGKILL)
        gone = time.monotonic()
        clients.goes_on()
        while time.monotonic() < gone + ABSENCE:
            clients.goes_on()
        deployment.start_router(2)  # and from now on every expert has two copies
        deployment.workers += deployment.add_workers(1)
        deployment.settle(3)
        states(deployment.caller, lambda found: summary(found)["fewest_copies"] == 2)


def test_every_worker_is_started_anew_one_by_one(deployment: Deployment) -> None:
    with load(deployment.gateway, deployment.expected) as clients:
        for worker in list(deployment.workers):
            deployment.leave(worker)
            deployment.workers += deployment.add_workers(1)
            deployment.settle(3)
            clients.goes_on()


def test_workers_are_killed(deployment: Deployment) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with load(deployment.gateway, deployment.expected) as clients:
        for _ in range(KILLS):  # at a random moment; a new one takes its place
            time.sleep(chance.random() / 2)
            deployment.workers.pop(chance.randrange(3)).stop(signal.SIGKILL)
            clients.goes_on()
            deployment.settle(2)  # everything has two copies again, on those that are left
            deployment.workers += deployment.add_workers(1)
            deployment.settle(3)
            clients.goes_on()


def test_a_gateway_is_killed(deployment: Deployment) -> None:
    """The other one is not affected, no worker goes on computing for it, and soon nothing waits for it any more."""
    other = deployment.start_gateway()
    with load(other, deployment.expected) as clients:
        body = body_of(PROMPTS[0], 400, stream=True)
        with httpx.stream("POST", f"{deployment.gateway.address}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            deployment.gateway.stop(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
        clients.goes_on()
        states(deployment.caller, lambda found: len(found.gateways) == 1)
        deployment.leave(deployment.workers[0])  # which waits for gateways that may be there
    for worker in deployment.workers:
        while in_flight(worker):
            assert worker.popen.poll() is None
    assert [each.tokens for each in undisturbed(other)] == [each.tokens for each in deployment.expected]


def in_flight(worker: Process) -> float:
    """Calls that it has taken and not answered."""
    text = httpx.get(worker.metrics, timeout=60).text
    (line,) = (each for each in text.splitlines() if each.startswith("consilium_expert_service_calls_in_flight{"))
    return float(line.split()[-1])
