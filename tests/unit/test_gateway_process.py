"""The gateway's command line, and what its HTTP process does without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from consilium.errors import ConfigError
from gateway.__main__ import main, parse_arguments


def test_the_http_process_imports_neither_torch_nor_grpc() -> None:
    """It must start fast and stay small; the engine process has both."""
    code = "import sys, gateway.__main__, gateway.app; print(*({'torch', 'grpc', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_flags_become_configuration() -> None:
    config = parse_arguments(
        [
            "--model",
            "M",
            "--quantization",
            "none",
            "--dtype",
            "bfloat16",
            "--host",
            "::1",
            "--port",
            "0",
            "--threads",
            "2",
        ]
    )
    assert (config.model, config.quantization, config.dtype) == ("M", "none", "bfloat16")
    assert (config.gateway.host, config.gateway.port, config.gateway.threads) == ("::1", 0, 2)


def test_endpoints_of_one_name_are_replicas() -> None:
    flags = ["a=grpc://h:1", "b=grpc://h:2", "a=grpc://h:3"]
    config = parse_arguments([part for each in flags for part in ("--group-endpoint", each)])
    assert {name: group.endpoints for name, group in config.experts.items()} == {
        "a": ("grpc://h:1", "grpc://h:3"),
        "b": ("grpc://h:2",),
    }


def test_the_command_line_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(
        "gateway: {port: 9000, max_running: 3}\nexperts: {a: {endpoint: 'grpc://h:1', max_batch: 7}}", "utf-8"
    )
    config = parse_arguments(["--config", str(file), "--port", "9001", "--group-endpoint", "a=grpc://h:2"])
    assert (config.gateway.port, config.gateway.max_running) == (9001, 3)
    assert (config.experts["a"].endpoints, config.experts["a"].max_batch) == (("grpc://h:2",), 7)


@pytest.mark.parametrize("given", ["grpc://h:1", "=grpc://h:1", "a.b=grpc://h:1"])
def test_a_malformed_endpoint_is_explained(given: str) -> None:
    with pytest.raises(ConfigError, match="NAME=grpc://HOST:PORT"):
        parse_arguments(["--group-endpoint", given])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "/nowhere"], "nowhere"),
        (["--port", "70000"], "gateway.port"),
        (["--group-endpoint", "a=http://h:1"], "grpc://HOST:PORT"),
    ],
)
def test_a_start_up_error_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert "Traceback" not in shown.err
