"""The Docker Engine that is running: its commands, our images, and deployments by compose that leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

PROJECT = Path(__file__).parents[2]
STAND_INS_FILE = Path(__file__).with_name("stand-ins.Dockerfile")
STAND_INS = ("redis", "prometheus")
# Where scripts/system-setup.sh puts torch's wheel when image builds cannot download it.
WHEELS = PROJECT / "build" / "wheels"
TAG = "test"
# What the tests set for the compose files: images of their own, and any free port.
VARIABLES = {"TAG": TAG, "GATEWAY_PORT": "0"}
SECONDS = 900.0


def docker(*arguments: str, standard_input: str | None = None, seconds: float = SECONDS) -> str:
    """Standard output of a docker command; raises with its standard error when it fails."""
    finished = subprocess.run(
        ["docker", *arguments],
        input=standard_input,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, **VARIABLES},
    )
    if finished.returncode != 0:
        raise AssertionError(f"docker {' '.join(arguments)} (exit {finished.returncode}):\n{finished.stderr[-6000:]}")
    return finished.stdout


def logs(container: str) -> str:
    """What a container has written, to standard output and standard error."""
    command = ("docker", "logs", container)
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def inspect(name: str) -> dict[str, Any]:
    """What the engine knows about a container or an image."""
    (found,) = json.loads(docker("inspect", name))
    return dict(found)


@dataclass(frozen=True)
class Deployment:
    """A compose file as a compose project of the tests' own."""

    project: str
    files: tuple[Path, ...]
    services: tuple[str, ...] = ()  # those to start

    def compose(self, *arguments: str) -> str:
        """Standard output of a docker compose command."""
        files = [part for file in self.files for part in ("--file", str(file))]
        return docker("compose", "--progress", "plain", "--project-name", self.project, *files, *arguments)

    def config(self) -> dict[str, Any]:
        """What compose makes of the files."""
        return dict(json.loads(self.compose("config", "--format", "json")))

    def foreign_images(self) -> dict[str, str]:
        """The images that are not built here, by service."""
        services = self.config()["services"]
        ours = {service["image"] for service in services.values() if "build" in service}
        return {name: service["image"] for name, service in services.items() if service["image"] not in ours}

    def build(self) -> None:
        """Build our images, one after the other: side by side each build would install torch for itself."""
        for name, service in self.config()["services"].items():
            if "build" in service:
                self.compose("build", name)

    def up(self) -> None:
        """Start what is not running, and return once everything is healthy; fails with the logs."""
        try:
            self.compose("up", "--detach", "--wait", "--no-build", "--pull", "never", *self.services)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def down(self) -> None:
        """Remove containers, volumes and networks."""
        self.compose("down", "--volumes")

    def logs(self) -> str:
        """The state of every container and its last lines."""
        return self.compose("ps", "--all") + self.compose("logs", "--no-color", "--tail", "40")

    def containers(self) -> dict[str, dict[str, Any]]:
        """Everything the engine knows about this project's containers, by service and number: `gateway-1`."""
        names = self._labelled("ps", "--all")
        found = json.loads(docker("inspect", *names)) if names else []
        return {each["Name"].removeprefix(f"/{self.project}-"): each for each in found}

    def left(self) -> dict[str, list[str]]:
        """Ids of the containers, volumes and networks there are."""
        return {
            "containers": self._labelled("ps", "--all"),
            "volumes": self._labelled("volume", "ls"),
            "networks": self._labelled("network", "ls"),
        }

    def _labelled(self, *command: str) -> list[str]:
        return docker(*command, "--quiet", "--filter", f"label=com.docker.compose.project={self.project}").split()

    def execute(self, service: str, *command: str) -> str:
        """Standard output of a command inside a running container."""
        return self.compose("exec", "--no-TTY", service, *command)

    @property
    def url(self) -> str:
        """Where the gateway is published."""
        return f"http://{self.compose('port', 'gateway', '8000').strip()}"

    def load(self) -> list[dict[str, Any]]:
        """The workers as the gateway sees them."""
        workers: list[dict[str, Any]] = httpx.get(f"{self.url}/load", timeout=30).json()["workers"]
        return workers


@contextmanager
def deployed(deployment: Deployment) -> Iterator[Deployment]:
    """``deployment`` up and healthy; taken down at the end, and whatever an earlier run has left before."""
    deployment.down()
    try:
        deployment.up()
        yield deployment
    finally:
        deployment.down()


def describe(file: Path, folder: Path) -> Deployment:
    """The deployment of a compose file; the torch wheel, where there is one, is handed to the builds of its images."""
    bare = Deployment(f"{yaml.safe_load(file.read_text('utf-8'))['name']}-test", (file,))
    services = bare.config()["services"]
    handed = {"build": {"additional_contexts": {"wheels": str(WHEELS)}}} if any(WHEELS.glob("torch-*.whl")) else {}
    overrides = folder / file.name
    built = [name for name, service in services.items() if "build" in service]
    overrides.write_text(json.dumps({"services": dict.fromkeys(built, handed)}))
    return Deployment(bare.project, (file, overrides), tuple(services))


def have_images(images: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Get the images (service → name), or stand-ins; returns the services with a stand-in, and those with no image."""
    absent = [service for service, image in images.items() if not _have_image(image)]
    built = [service for service in absent if service in STAND_INS]
    for service in built:
        target = ("--target", service, "--tag", images[service])
        docker("build", "--quiet", *target, "--file", str(STAND_INS_FILE), str(STAND_INS_FILE.parent))
    return built, [service for service in absent if service not in STAND_INS]


def _have_image(image: str) -> bool:
    for command in (("image", "inspect", image), ("pull", "--quiet", image)):
        try:
            docker(*command)
        except AssertionError:
            continue
        return True
    return False
