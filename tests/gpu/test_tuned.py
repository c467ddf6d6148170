"""Tilings that were measured are kept, found again, and not believed when they are garbage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium.gpu import samples, tune
from consilium.gpu.experts import ExpertForm
from consilium.gpu.tiling import HALF_TILINGS, INTEGER_TILINGS, Batch, batch_of, nearest
from consilium.gpu.tuned import float_class, keep, table_path, tilings_for
from tests.gpu.test_experts import APART, SMALL

FORM = ExpertForm(64, 32, torch.int8, torch.int8, torch.bfloat16)
FLOATS = ExpertForm(64, 32, torch.bfloat16, torch.int8, torch.bfloat16)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path))


def test_kept_and_found_again(device: torch.device) -> None:
    assert tilings_for(FORM, device) is INTEGER_TILINGS
    measured = [(Batch(8, 1), SMALL), (Batch(128, 64), APART)]
    assert keep(FORM, device, measured) == table_path(device)
    keep(FLOATS, device, measured[:1])
    assert tilings_for(FORM, device) == measured
    assert tilings_for(FLOATS, device) == measured[:1]
    assert tilings_for(ExpertForm(128, 32, torch.bfloat16, torch.int8, torch.float32), device) is HALF_TILINGS


@pytest.mark.parametrize("text", ["{", "[]", '{"64x32-int8-int8": [{"experts": 0}]}', '{"64x32-int8-int8": 3}'])
def test_garbage_is_not_used(device: torch.device, text: str, caplog: pytest.LogCaptureFixture) -> None:
    table_path(device).parent.mkdir(parents=True)
    table_path(device).write_text(text)
    assert tilings_for(FORM, device) is INTEGER_TILINGS
    assert "run python -m consilium.gpu.tune again" in caplog.text


def test_the_nearest_batch() -> None:
    assert nearest(INTEGER_TILINGS, Batch(8, 1)) is INTEGER_TILINGS[0][1]
    assert nearest(INTEGER_TILINGS, batch_of(4096 * 8, 128)) is INTEGER_TILINGS[-1][1]
    alone, many = batch_of(1, 128), batch_of(100_000, 128)
    assert (alone.experts, alone.rows) == pytest.approx((1, 1))
    assert (many.experts, many.rows) == pytest.approx((128, 100_000 / 128))
    assert batch_of(3, 1) == Batch(1, 3)


def test_sums_of_floats_have_classes_by_their_tiles(device: torch.device) -> None:
    classes = {float_class(FLOATS, [(Batch(8, 1), tiling)], device) for tiling in (SMALL, APART)}
    assert len(classes) == 2
    assert all(each.startswith("int8-weight-only-bfloat16/") for each in classes)


@pytest.mark.parametrize("quantization", ["int8", "int8-weight-only"])
def test_tuning_keeps_what_was_fastest(
    device: torch.device, quantization: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "TILE_ROWS", (16,))
    monkeypatch.setattr(tune, "COLUMNS", (32,))
    monkeypatch.setattr(samples, "BATCHES", 1)
    if device.type == "cuda":
        monkeypatch.setattr(tune, "tilings_to_compile", lambda _: [])
    sizes = ["--hidden", "32", "--expert-size", "32", "--experts", "2", "--top-k", "1", "--tokens", "1", "2"]
    assert tune.main(["--quantization", quantization, *sizes]) == 0
    assert f"kept in {table_path(device)}" in capsys.readouterr().out
    rows = torch.int8 if quantization == "int8" else torch.bfloat16
    found = tilings_for(ExpertForm(32, 32, rows, torch.int8, torch.bfloat16), device)
    assert len(found) == (2 if quantization == "int8" else 1)
    assert all(tiling.block_m == 16 for _, tiling in found)
