"""What the interpreter runs is also compiled for the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "compile_kernels": {"gate_up", "down", "_sort_pairs", "_quantize_rows", "_meet", "_own_pairs", "_add"},
    "compile_gateway": {
        "_linear",
        "_rms_norm",
        "_prepare",
        "_attend",
        "_merge",
        "_logits",
        "_choose",
        "_combine",
        "_pick",
    },
}


@pytest.mark.parametrize(("program", "kernels"), PROGRAMS.items(), ids=list(PROGRAMS))
def test_every_kernel_compiles_for_an_h100(program: str, kernels: set[str], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.gpu.{program}"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= kernels
