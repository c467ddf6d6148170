"""A real Prometheus that scrapes what a test started, with the rules of deploy/prometheus."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus"
DISCOVERY = ("static_configs", "dns_sd_configs")
START_SECONDS = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class Prometheus:
    """Its HTTP API."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer; raises with the error that it holds instead."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10.0).json()
        assert answer["status"] == "success", f"{path} {parameters}: {answer['error']}"
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """Labels and value of every sample that ``expression`` has now."""
        result: list[Any] = self.get("query", query=expression)["result"]
        return result


@contextmanager
def running_prometheus(targets: Mapping[str, Sequence[str]], folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the project's configuration, but with these targets (HOST:PORT) for its jobs, scraped fast."""
    _configure(targets, folder)
    log = folder / "prometheus.log"
    argv = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as errors:
        process = subprocess.Popen([*argv, "--web.listen-address=127.0.0.1:0"], stderr=errors, stdout=errors)
    try:
        address = wait_for(lambda: _address(process, log), START_SECONDS)
        prometheus = Prometheus(f"http://{address}")
        wait_for(lambda: httpx.get(f"{prometheus.url}/-/ready").is_success, START_SECONDS)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def wait_for(look: Callable[[], T], seconds: float) -> T:
    """The first true value that ``look`` has; raises with the last one when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
        time.sleep(0.2)
    return found


def _configure(targets: Mapping[str, Sequence[str]], folder: Path) -> None:
    configuration = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text("utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    jobs = configuration["scrape_configs"]
    assert {job["job_name"] for job in jobs} == set(targets)
    for job in jobs:
        assert [key for key in DISCOVERY if job.pop(key, None)], f"{job} has no targets"
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    for name in configuration["rule_files"]:
        shutil.copy(CONFIGURATION / name, folder)


def _address(process: subprocess.Popen[bytes], log: Path) -> str | None:
    written = log.read_text("utf-8", errors="replace")
    assert process.poll() is None, written
    found = re.search(r'msg="Listening on" address=(\S+)', written)
    return found[1] if found else None
