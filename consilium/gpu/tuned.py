"""Tilings that were measured on a device (`python -m consilium.gpu.tune`), kept in the user's cache folder.

Without them the ones of consilium.gpu.tiling serve.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import triton

from consilium.experts import ARITHMETIC_VERSION
from consilium.gpu.experts import ExpertForm
from consilium.gpu.tiling import USUAL, Batch, Blocks, Tiling, Tilings
from consilium.models import cache_folder

logger = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """As its driver has it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def table_path(device: torch.device) -> Path:
    """The file of a device and this version of Triton."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())
    return cache_folder() / "gpu" / f"{name}-triton-{triton.__version__}.json"


def form_key(form: ExpertForm) -> str:
    """Experts with the same key have the same best tilings."""
    rows, weights = (str(each).removeprefix("torch.") for each in (form.rows, form.weights))
    return f"{form.hidden_size}x{form.expert_size}-{rows}-{weights}"


def tilings_for(form: ExpertForm, device: torch.device) -> Tilings:
    """What was measured for experts of this form, else the usual ones."""
    usual = USUAL[form.rows]
    path = table_path(device)
    try:
        kept = json.loads(path.read_text()).get(form_key(form))
        return [_read(entry) for entry in kept] if kept else usual
    except FileNotFoundError:
        return usual
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s is not used: %r; remove it, or run python -m consilium.gpu.tune again", path, error)
        return usual


def keep(form: ExpertForm, device: torch.device, tilings: Tilings) -> Path:
    """Write them beside those of other forms; the file."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    if path.exists():
        known = json.loads(path.read_text())
    known[form_key(form)] = [_written(batch, tiling) for batch, tiling in tilings]
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(known, indent=1))
    unfinished.rename(path)
    return path


def float_class(form: ExpertForm, tilings: Tilings, device: torch.device) -> str:
    """The numerics class of sums of floats: their order comes from the device, the compiler and the tiles."""
    kind = "int8-weight-only" if form.weights is torch.int8 else "none"
    chip = "interpreter"
    if device.type == "cuda":
        chip = "cuda-sm{}{}".format(*torch.cuda.get_device_capability(device))
    tiling = tilings[0][1]
    products = "/".join(f"{each.n}x{each.k}w{each.warps}" for each in (tiling.gate_up, tiling.down))
    rows = str(form.rows).removeprefix("torch.")
    return f"{kind}-{rows}/{chip}/triton-{triton.__version__}/{tiling.block_m}/{products}/{ARITHMETIC_VERSION}"


def _written(batch: Batch, tiling: Tiling) -> dict[str, Any]:
    blocks = {name: [each.n, each.k, each.warps, each.stages] for name, each in _products(tiling)}
    numbers = {"experts": batch.experts, "rows": batch.rows, "block_m": tiling.block_m}
    return numbers | blocks | {"quantize_first": tiling.quantize_first}


def _read(entry: dict[str, Any]) -> tuple[Batch, Tiling]:
    """Raises where it is none."""
    batch = Batch(float(entry["experts"]), float(entry["rows"]))
    gate_up, down = (Blocks(*(int(each) for each in entry[name])) for name in ("gate_up", "down"))
    if batch.experts <= 0 or batch.rows <= 0:
        raise ValueError(f"a batch of {batch}")
    return batch, Tiling(int(entry["block_m"]), gate_up, down, quantize_first=bool(entry["quantize_first"]))


def _products(tiling: Tiling) -> list[tuple[str, Blocks]]:
    return [("gate_up", tiling.gate_up), ("down", tiling.down)]
