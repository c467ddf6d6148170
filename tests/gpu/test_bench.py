"""The bench of kernels runs where there is no GPU, so that none is asked for in vain."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import gpu, gpu_experts, gpu_layer
from consilium.config import Quantization
from consilium.gpu import samples

SIZES = replace(gpu_experts.TOY, tokens=(2,))


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_kernels_beside_their_floor(
    device: torch.device, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "BATCHES", 1)
    best = {"bytes_per_second": 1e11, "operations_per_second": {"int8": 1e12, "bfloat16": 1e12}}
    (figures,) = gpu_experts.measure(SIZES, quantization, device, best)
    weights = 3 * SIZES.hidden * SIZES.expert_size * (1 if quantization == "int8" else 2)
    assert 2 * weights <= figures["bytes"] < 5 * (weights + 2**14)  # two to four experts, with rows and scales
    assert figures["floor_seconds"] == pytest.approx(figures["bytes"] / 1e11)
    assert figures["of_floor"] > 1
    assert json.dumps(figures)
    Console(quiet=True).print(gpu_experts.kernel_table("kernels", [figures]))


HANGING = """
import subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-I", "-c", "import threading; threading.Event().wait()"])
print(child.pid, flush=True)

def stuck_here():
    threading.Event().wait()

stuck_here()
"""


def test_a_section_that_takes_too_long_says_where_it_is_and_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_apart([sys.executable, "-c", HANGING], 8.0, {}) is None
    said = capfd.readouterr()
    assert "in stuck_here" in said.err
    with contextlib.suppress(ProcessLookupError):  # its child is gone, or about to be
        watched = os.pidfd_open(int(said.out))
        assert select.select([watched], [], [], 30.0)[0]
        os.close(watched)
    assert gpu.run_apart([sys.executable, "-c", "raise SystemExit(3)"], 30.0, {}) == 3


def test_a_section_for_which_there_is_no_time_is_not_begun(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["experts", "worker", "--toy", "--within", "1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: experts, worker"


def test_kernels_of_the_gateway_and_their_tiles() -> None:
    found = dict[str, Any]()
    gpu_layer.run(True, Console(quiet=True), found.update)
    decoding, prompt = found["kernels"].values()
    assert set(decoding) - set(prompt) == {"head", "largest"}
    assert all(0 < each["floor_seconds"] < each["seconds"] for each in (*decoding.values(), *prompt.values()))
    assert len(found["tiles"]) == 6
    assert json.dumps(found)


def test_a_section_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["expert"])
    assert "no section expert; there are experts," in capsys.readouterr().err
