"""`--model ORG/NAME` against a stand-in for a hub: what is downloaded, what is not, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import COMMIT, REPO, TOKEN, Hub, serve
from tests.random_checkpoint import save_random_mixtral
from tests.tiny_models import save_mixtral

WEIGHTS = "model.safetensors"
CHUNK = 10 * 2**20  # what huggingface_hub writes at a time
# What repositories hold for other programs.
DUPLICATES = (
    "pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "tiny.Q8_0.gguf",
    "original/config.json",
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = save_mixtral(tmp_path / "repository")
    (folder / "original").mkdir()
    for name in DUPLICATES:
        (folder / name).write_bytes(b"{}")
    with serve(folder) as hub:
        yield hub


def run(hub: Hub, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of ours with the hub as its only one."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CONSILIUM_"))}
    environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **variables}
    command = [sys.executable, "-m", "consilium", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def snapshot(home: Path) -> Path:
    return home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT


def test_only_what_is_needed_is_downloaded_and_then_no_hub_is(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    finished = run(hub, home, "model", "fetch", REPO)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"the model is in {snapshot(home)}\n"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS} <= hub.got()
    assert not hub.got() & set(DUPLICATES)
    assert (snapshot(home) / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    hub.requests.clear()
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        inspected = run(hub, home, "inspect", REPO, "--json", **variables)
        assert inspected.returncode == 0, inspected.stderr
        assert json.loads(inspected.stdout)["stored"]["experts"]["F32"] > 0
    assert hub.requests == []


def test_a_download_that_was_cut_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The connection breaks in the middle of the weights; what had been written, in pieces of 10 MiB, stays."""
    save_random_mixtral(tmp_path / "repository", experts=4)
    with serve(tmp_path / "repository") as hub:
        hub.cut = WEIGHTS
        assert 2 * CHUNK < (hub.folder / WEIGHTS).stat().st_size < 3 * CHUNK
        finished = run(hub, tmp_path / "home", "model", "fetch", REPO)
    assert finished.returncode == 0, finished.stderr
    assert hub.cut is None
    downloads = [each.range for each in hub.requests if each.file == WEIGHTS and each.method == "GET"]
    assert downloads == [None, f"bytes={CHUNK}-"]
    assert (snapshot(tmp_path / "home") / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()


def test_files_that_are_finished_are_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    """As after a killed process: all but the weights are there."""
    (hub.folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    assert run(hub, tmp_path / "home", "model", "fetch", REPO).returncode == 1
    (tmp_path / WEIGHTS).rename(hub.folder / WEIGHTS)
    shutil.rmtree(snapshot(tmp_path / "home").parents[1] / "trees", ignore_errors=True)  # the list of files that it saw
    hub.requests.clear()
    finished = run(hub, tmp_path / "home", "model", "fetch", REPO)
    assert finished.returncode == 0, finished.stderr
    assert hub.got() == {WEIGHTS}


def test_an_index_says_which_files_hold_the_weights(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / WEIGHTS).rename(hub.folder / "odd-1-of-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "odd-1-of-1.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    finished = run(hub, tmp_path / "home", "model", "fetch", f"{REPO}@{COMMIT}")
    assert finished.returncode == 0, finished.stderr
    assert "odd-1-of-1.safetensors" in hub.got()
    assert not hub.got() & set(DUPLICATES)


def test_a_token_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    refused = run(hub, tmp_path / "home", "inspect", REPO)
    assert refused.returncode == 1
    assert f"accept its terms at {hub.endpoint}/{REPO}, then set HF_TOKEN" in refused.stderr
    assert run(hub, tmp_path / "home", "inspect", REPO, HF_TOKEN=TOKEN).returncode == 0


def test_what_cannot_be_served_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "model_type": "jamba"}))
    finished = run(hub, tmp_path / "home", "inspect", REPO)
    assert finished.returncode == 1
    assert "it has Mamba layers" in finished.stderr
    assert WEIGHTS not in hub.got()


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("org/nothing", {}, "no such repository at http://127.0.0.1"),
        (f"{REPO}@v9", {}, "it has no revision 'v9'"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to download it"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach http://127.0.0.1:9"),  # nothing listens there
    ],
)
def test_what_cannot_be_had_is_explained(
    name: str, variables: dict[str, str], message: str, hub: Hub, tmp_path: Path
) -> None:
    finished = run(hub, tmp_path / "home", "inspect", name, **variables)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_weights_that_are_no_safetensors_are_refused(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / WEIGHTS).unlink()
    finished = run(hub, tmp_path / "home", "inspect", REPO)
    assert finished.returncode == 1
    assert "only safetensors are read" in finished.stderr
