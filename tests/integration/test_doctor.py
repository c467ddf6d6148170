"""`consilium doctor` against real workers: what it measures, what it says, and how it ends."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from gateway.doctor.__main__ import main
from tests.stack import Process


def test_a_healthy_worker(int8_worker: Process, tiny_mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--endpoint", int8_worker.address, "--model", str(tiny_mixtral), "--calls", "5"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == {}
    [worker] = found["workers"].values()
    assert worker["experts"] == 12
    assert worker["round_trip"] > 0
    assert 0 < worker["few"] < worker["many"] * 100
    assert found["verdict"][0] == "A token passes 3 layers with experts."
    assert worker["local_link"]
    assert main([*command, "--grpc"]) == 0
    out = capsys.readouterr().out
    assert "gRPC" in out
    assert "One worker holds all the experts" in out


def test_without_a_model_it_says_what_is_missing(float_worker: Process, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--endpoint", float_worker.address, "--calls", "1"]) == 0
    assert "give --top-k" in capsys.readouterr().out


def test_workers_that_do_not_fit_each_other(
    int8_worker: Process, float_worker: Process, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoints = ["--endpoint", int8_worker.address, "--endpoint", float_worker.address]
    assert main([*endpoints, "--calls", "1", "--top-k", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    odd = float_worker.address.removeprefix("grpc://")
    assert list(found["problems"]) == [odd]
    assert "quantization is none where int8 is expected" in found["problems"][odd]
    assert list(found["workers"]) == [int8_worker.address.removeprefix("grpc://")]


def test_nobody_there_and_experts_on_no_worker(
    float_worker: Process, tiny_mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # bound and not listening: calls are refused
        taken.bind(("127.0.0.1", 0))
        nobody = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        command = ["--endpoint", nobody, "--endpoint", float_worker.address, "--calls", "1"]
        assert main([*command, "--model", str(tiny_mixtral)]) == 1
    out = capsys.readouterr().out
    assert f"{nobody}: cannot be reached" in out
    assert "no worker that fits holds 3 of its experts" in out


def test_what_it_cannot_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--endpoint grpc://HOST:PORT" in capsys.readouterr().err
    assert main(["--endpoint", "http://x:1"]) == 1
    assert "is not an endpoint" in capsys.readouterr().err
