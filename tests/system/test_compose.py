"""The images and the two compose files on a real Docker Engine, against `consilium up` on this machine.

In the order of the file: one deployment goes through its life.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.stack import launch
from tests.system.docker_engine import PROJECT, TAG, Deployment, deployed, describe, docker, have_images, inspect, logs
from tests.system.prometheus import wait_for
from tests.unit.test_config import SKETCH

FILES = ("docker-compose.yml", "docker-compose.vision-language.yml")
OURS = {service: f"consilium/{service}:{TAG}" for service in ("gateway", "expert")}
LARGEST_IMAGE = 1.3e9
# No two begin alike, so that the cache of expert outputs never has all of one.
PROMPTS = [f"{number} and {number + 1} make" for number in range(2, 26)]
ASKED_FIRST, ASKED_AFTER_KILL, ASKED_MEANWHILE = PROMPTS[:3], PROMPTS[3:5], PROMPTS[5:]
CLIENTS = 4

Answer = tuple[list[str], list[float]]  # tokens and their logprobs


@pytest.fixture(scope="session")
def engine() -> str:
    """The version of the Docker Engine that runs; there must be one."""
    try:
        return docker("version", "--format", "{{.Server.Version}}").strip()
    except (AssertionError, FileNotFoundError) as error:
        pytest.fail(f"these tests need a running Docker Engine with Compose and buildx (DOCKER_HOST names it): {error}")


@pytest.fixture(scope="session")
def deployments(
    engine: str, findings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Deployment]]:
    """A deployment for each compose file, with all images there; a service whose image cannot be had is left out."""
    folder = tmp_path_factory.mktemp("compose")
    made = {file: describe(PROJECT / file, folder) for file in FILES}
    started = time.monotonic()
    made[FILES[0]].build()
    seconds = time.monotonic() - started
    findings.append(f"images built in {seconds:.0f} s, less what Docker {engine} had in its cache")
    images = made[FILES[0]].foreign_images()
    stand_ins, missing = have_images(images)
    findings.extend(f"{images[each]} could not be pulled: Debian's package stood in" for each in stand_ins)
    findings.extend(f"{images[each]} could not be pulled: NOT RUN" for each in missing)
    yield {
        file: replace(each, services=tuple(name for name in each.services if name not in missing))
        for file, each in made.items()
    }
    docker("image", "rm", *OURS.values(), *(images[each] for each in stand_ins))


@pytest.fixture(scope="module")
def expected() -> dict[str, Answer]:
    """What `consilium up` on this machine answers to the prompts that come one at a time."""
    up = launch(["consilium", "up", "--port", "0", "--no-demo", "--workers", "2"])
    try:
        assert up.popen.stdout is not None
        lines = iter(up.popen.stdout)
        url = next((match[1] for line in lines if (match := re.search(r"ready at (http://\S+)/v1", line))), None)
        assert url is not None, up.log()
        return ask_in_turn(url, ASKED_FIRST + ASKED_AFTER_KILL)
    finally:
        assert up.stop() == 0, up.log()


@pytest.fixture(scope="module")
def deployment(deployments: dict[str, Deployment], expected: object) -> Iterator[Deployment]:
    """docker-compose.yml, up and healthy. `expected` comes first, so that two stacks never share the cores."""
    del expected
    with deployed(deployments[FILES[0]]) as running:
        yield running


def ask(url: str, prompt: str) -> Answer:
    """The greedy answer to ``prompt``; one attempt only."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        answer = client.completions.create(model="default", prompt=prompt, max_tokens=6, temperature=0, logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    return logprobs.tokens or [], logprobs.token_logprobs or []


def ask_in_turn(url: str, prompts: Sequence[str]) -> dict[str, Answer]:
    return {prompt: ask(url, prompt) for prompt in prompts}


@pytest.mark.parametrize("service", OURS)
def test_image(service: str, deployments: object, findings: list[str]) -> None:
    del deployments
    name = OURS[service]
    image = inspect(name)
    findings.append(f"{name} has {image['Size'] / 1e6:.0f} MB")
    assert image["Size"] < LARGEST_IMAGE
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Entrypoint"] == ["consilium", service]  # no shell between the engine and the service
    assert image["Config"]["Healthcheck"]["Test"][:4] == ["CMD", "python", "-m", "consilium.health"]
    packages = json.loads(docker("run", "--rm", "--entrypoint", "pip", name, "list", "--format", "json"))
    assert "torch" in {each["name"] for each in packages}
    assert not {"pytest", "mypy", "openai", "transformers"} & {each["name"] for each in packages}


def test_everything_is_healthy_and_only_the_gateway_published(deployment: Deployment) -> None:
    states = {name: each["State"] for name, each in deployment.containers().items()}
    assert [states.pop(f"{once}-1")["ExitCode"] for once in ("fetch-model", "make-tokens")] == [0, 0]
    replicas = {f"experts-{group}-{number}" for group in "ab" for number in (1, 2)}
    assert states.keys() >= {"gateway-1", "router-1", "redis-1", "prometheus-1"} | replicas
    assert {name: state["Health"]["Status"] for name, state in states.items()} == dict.fromkeys(states, "healthy")
    published = {
        name: {(binding["HostIp"], port) for port, bindings in ports.items() for binding in bindings or ()}
        for name, each in deployment.containers().items()
        if any((ports := each["NetworkSettings"]["Ports"]).values())
    }
    assert published == {"gateway-1": {("127.0.0.1", "8000/tcp")}}


@pytest.mark.parametrize("service", ["gateway", "experts-a", "experts-b"])
def test_inside_a_container(service: str, deployment: Deployment) -> None:
    look = """
import json, os, pathlib
def writable(place):
    try:
        pathlib.Path(place, "probe").touch()
    except OSError as error:
        return error.strerror
    return "writable"
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
places = ("/", "/opt/consilium", "/weights", "/etc/consilium", os.environ["HOME"])
print(json.dumps({
    "first process": open("/proc/1/cmdline").read().split("\\0")[1:3],
    "uids": status["Uid"].split(), "capabilities": int(status["CapEff"], 16), "no new": status["NoNewPrivs"],
    "places": {place: writable(place) for place in places},
}))
"""
    closed = dict.fromkeys(("/", "/opt/consilium", "/weights", "/etc/consilium"), "Read-only file system")
    assert json.loads(deployment.execute(service, "python", "-c", look)) == {
        "first process": ["/opt/consilium/bin/consilium", "gateway" if service == "gateway" else "expert"],
        "uids": ["10001"] * 4,
        "capabilities": 0,
        "no new": "1",
        "places": {**closed, "/tmp": "writable"},  # noqa: S108 the container's own
    }


def test_frames_go_over_the_sockets_in_the_shared_folder(deployment: Deployment) -> None:
    """Every container has a network of its own, and does not see the others' abstract names."""
    assert [(each["transport"], each["detail"]) for each in deployment.load()] == [("local", "")] * 4


def test_answers_are_those_of_consilium_up(deployment: Deployment, expected: dict[str, Answer]) -> None:
    assert ask_in_turn(deployment.url, ASKED_FIRST) == {prompt: expected[prompt] for prompt in ASKED_FIRST}


def test_rows_are_kept_in_redis(deployment: Deployment) -> None:
    assert wait_for(lambda: _metric(deployment, "consilium_cache_written_rows_total"), 30)
    assert _metric(deployment, 'consilium_cache_errors_total{kind="refused"') == 0


def _metric(deployment: Deployment, start: str) -> float:
    lines = httpx.get(f"{deployment.url}/metrics", timeout=30).text.splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start)]
    assert values, f"no metric {start}"
    return sum(values)


def test_prometheus_scrapes_gateway_router_and_every_replica(deployment: Deployment) -> None:
    command = ("promtool", "query", "instant", "http://127.0.0.1:9090", "up == 1")

    def scraped() -> list[str]:
        found = re.findall(r'job="consilium-(\w+)"', deployment.execute("prometheus", *command))
        return sorted(found) if len(found) == 6 else []

    assert wait_for(scraped, 60) == ["experts"] * 4 + ["gateway", "router"]


def test_a_killed_replica_is_survived(deployment: Deployment, expected: dict[str, Answer]) -> None:
    url, busy = deployment.url, threading.Event()
    answered: list[str] = []

    def ask_and_tell(prompt: str) -> Answer:
        answer = ask(url, prompt)
        answered.append(prompt)
        if len(answered) >= CLIENTS:
            busy.set()
        return answer

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(ask_and_tell, prompt) for prompt in ASKED_MEANWHILE]
        assert busy.wait(300)
        docker("kill", f"{deployment.project}-experts-a-1")
        assert len(answered) <= len(answers) - CLIENTS  # all clients are still busy
        # Not compared: which of them share a step is chance, and the last bits may depend on that.
        assert all(tokens for tokens, _ in (each.result() for each in answers))
    assert inspect(f"{deployment.project}-experts-a-1")["State"]["ExitCode"] == 137
    assert ask_in_turn(url, ASKED_AFTER_KILL) == {prompt: expected[prompt] for prompt in ASKED_AFTER_KILL}
    deployment.up()
    wait_for(lambda: [each["transport"] for each in deployment.load()] == ["local"] * 4, 60)


def test_a_worker_that_still_loads_ends_at_sigterm(deployment: Deployment) -> None:
    weights = f"{deployment.project}_weights:/weights:ro"
    options = ("--detach", "--read-only", "--tmpfs", "/tmp", "--cpus", "0.5", "--volume", weights)  # noqa: S108
    alone = ("--env", "CONSILIUM_WORKER__HOST=127.0.0.1")  # elsewhere it wants a token
    worker = docker("run", *options, *alone, OURS["expert"]).strip()
    try:
        wait_for(lambda: "integer product" in logs(worker), 120)
        docker("stop", "--time", "60", worker)
        assert inspect(worker)["State"]["ExitCode"] == 128 + 15
    finally:
        docker("rm", "--force", worker)


def test_stop_lets_requests_finish_and_everything_exit_with_0(deployment: Deployment) -> None:
    with OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        stream = client.completions.create(
            model="default", prompt="Once upon a time", max_tokens=24, temperature=0, stream=True
        )
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(deployment.compose, "stop")
            reasons = [chunk.choices[0].finish_reason for chunk in stream]
            stopping.result()
    assert reasons[-1] == "length"
    codes = {name: each["State"]["ExitCode"] for name, each in deployment.containers().items()}
    assert codes == dict.fromkeys(codes, 0)


def test_down_leaves_nothing(deployment: Deployment) -> None:
    assert all(deployment.left().values())
    deployment.down()
    assert not any(deployment.left().values())


def test_vision_and_language(deployments: dict[str, Deployment], expected: dict[str, Answer]) -> None:
    with deployed(deployments[FILES[1]]) as running:
        assert running.execute("gateway", "cat", "/etc/consilium/consilium.yaml").strip() == SKETCH.strip()
        assert ask_in_turn(running.url, ASKED_FIRST) == {prompt: expected[prompt] for prompt in ASKED_FIRST}
        workers = {(each["group"], each["connected"], each["transport"]) for each in running.load()}
        assert workers == {("vision", True, "local"), ("language", True, "local")}
    assert not any(running.left().values())


@pytest.mark.parametrize("file", FILES)
def test_mounted_files_are_there(file: str, deployments: dict[str, Deployment]) -> None:
    """The engine makes an empty folder of what is missing."""
    whole = deployments[file].config()
    mounts = [volume for service in whole["services"].values() for volume in service.get("volumes", ())]
    sources = [Path(mount["source"]) for mount in mounts if mount["type"] == "bind"]
    sources += [Path(each["file"]) for each in whole.get("configs", {}).values()]
    assert sources
    assert [str(source) for source in sources if not source.is_file() and not [*source.glob("*")]] == []
