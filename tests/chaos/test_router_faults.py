"""Workers killed, added and sent away, and the router killed, under load: no request fails, no bit changes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.completions import Completion, complete
from tests.integration.test_registration import settled, states
from tests.integration.test_router_service import Caller, argv, calling
from tests.stack import Process, launch, running, wait_ready, worker_argv
from tests.tiny_models import save_mixtral

PROMPTS = [[(7 * i + 13 * n) % 380 + 2 for i in range(length)] for n, length in enumerate((3, 40, 17))]
NEW_TOKENS = 24
KILLS = int(os.environ.get("ROUTER_KILLS", "1"))  # more of them in a long run
ENOUGH = 6  # answers that say the load goes on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny")


@dataclass
class Load:
    """Clients that ask without a pause, and compare every answer with what was answered before anything happened."""

    url: str
    expected: list[Completion]
    answers: int = 0
    errors: list[object] = field(default_factory=list)
    longest: float = 0.0  # seconds from question to answer
    _more: threading.Condition = field(default_factory=threading.Condition)

    def ask(self, stopping: threading.Event, turn: int) -> None:
        while not stopping.is_set():
            turn = (turn + 1) % len(PROMPTS)
            started = time.monotonic()
            try:
                answer = complete(self.url, PROMPTS[turn], NEW_TOKENS)
                assert answer.error is None, answer.error
                answer.assert_same(self.expected[turn])
            except Exception as error:  # told by the test's own thread
                self.errors.append(error)
            with self._more:
                self.answers += 1
                self.longest = max(self.longest, time.monotonic() - started)
                self._more.notify_all()

    def goes_on(self, answers: int = ENOUGH) -> None:
        """Return after so many more answers, all of them right."""
        with self._more:
            wanted = self.answers + answers
            assert self._more.wait_for(lambda: self.answers >= wanted, 60)
        assert not self.errors, self.errors


@contextmanager
def load(gateway: Process) -> Iterator[Load]:
    expected = [complete(gateway.address, prompt, NEW_TOKENS) for prompt in PROMPTS]
    clients, stopping = Load(gateway.address, expected), threading.Event()
    threads = [threading.Thread(target=clients.ask, args=(stopping, turn)) for turn in range(2)]
    for thread in threads:
        thread.start()
    try:
        clients.goes_on()
        yield clients
        clients.goes_on()
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60)
    print(
        f"{clients.answers} answers, {len(clients.errors)} failed or changed, the longest took {clients.longest:.2f} s"
    )
    assert not clients.errors, clients.errors


class Deployment:
    """A router, workers that joined it with nothing, and a gateway that knows only the router."""

    def __init__(self, model: Path, cleanup: ExitStack, replicas: int) -> None:
        self._model, self._cleanup = model, cleanup
        self._settings = ["--replicas", str(replicas)]
        self.router: Process
        self.caller: Caller
        self.start_router(0)
        self.workers = self.add_workers(3)

    def start_router(self, port: int) -> None:
        settings = argv(self._model, *self._settings, "--port", str(port))
        self.router = self._cleanup.enter_context(running(settings))
        self.caller = self._cleanup.enter_context(calling(self.router, self._model))

    def add_workers(self, count: int) -> list[Process]:
        """Workers that start side by side, from when they listen."""
        arguments = ("--model", str(self._model), "--join", self.router.address, "--speed", "1")
        started = [launch(worker_argv("all", *arguments)) for _ in range(count)]
        for worker in started:
            self._cleanup.callback(worker.stop, signal.SIGKILL)
        for worker in started:
            worker.wait_listening()
        return started

    def start_gateway(self) -> Process:
        settled_now = states(self.caller, settled(len(self.workers)))
        assert settled_now.missing == 0
        common = ["--model", str(self._model), "--router", self.router.address]
        gateway = self._cleanup.enter_context(running(["gateway", *common, "--port", "0", "--threads", "1"]))
        wait_ready(gateway)
        return gateway


@pytest.fixture
def deployment(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    monkeypatch.setattr("tests.stack._environment", lambda: {**os.environ, "CONSILIUM_ROUTER__LEASE": "2s"})
    with ExitStack() as cleanup:
        yield Deployment(model, cleanup, replicas=2)


def test_nobody_notices(deployment: Deployment) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with load(deployment.start_gateway()) as clients:
        for _ in range(KILLS):  # kill -9 at a random moment; a new one takes its place
            time.sleep(chance.random() / 2)
            deployment.workers.pop(chance.randrange(3)).stop(signal.SIGKILL)
            clients.goes_on()
            states(deployment.caller, settled(2))  # everything has two copies again, on those that are left
            deployment.workers += deployment.add_workers(1)
            states(deployment.caller, settled(3))
            clients.goes_on()
        leaving = deployment.workers.pop(chance.randrange(3))
        assert leaving.stop() == 0
        assert "nobody else holds" not in leaving.log()
        clients.goes_on()
        port = int(deployment.router.address.rsplit(":", 1)[1])
        deployment.router.stop(signal.SIGKILL)
        clients.goes_on()
        deployment.start_router(port)
        states(deployment.caller, settled(2))
        deployment.workers += deployment.add_workers(1)
        states(deployment.caller, settled(3))
        clients.goes_on()
