"""A run on disk, so that it can be taken up again: what learns, the optimizer's two moments, and the step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from consilium.errors import CheckpointError
from training.blocks import Tokens
from training.distill import Distillation, TrainingError
from training.split import Split

NAME, SPLITS, ROWS = "run.safetensors", "splits.safetensors", "generated.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_run(run: Distillation, folder: Path, recipe_hash: str, grown: Sequence[Sequence[int]] = ()) -> None:
    """Write the state; a full disk or a kill in between leaves the one before as it was. Raises TrainingError.

    ``grown`` are the experts that were split so far, one of each layer every time.
    """
    named = run.student.parameters()
    tensors = {name: tensor.detach().cpu() for name, tensor in named.items()}
    for name, tensor in named.items():
        for moment in _MOMENTS:
            if moment in run.optimizer.state[tensor]:
                tensors[f"{moment}.{name}"] = run.optimizer.state[tensor][moment].cpu()
    for number, layer in enumerate(run.student.layers):
        if layer.router is not None:
            tensors[f"{number}.bias"] = layer.router.bias.cpu()
    if run.load is not None:
        tensors["load"] = run.load.cpu()
    steps = {"step": str(run.step), "first_step": str(run.first_step)}
    _write(folder / NAME, tensors, {**steps, "recipe": recipe_hash, "grown": json.dumps(grown)})


def load_growth(folder: Path, recipe_hash: str) -> list[list[int]]:
    """The experts that the run in ``folder`` has split; none where there is no run. Raises CheckpointError."""
    found = _read(folder / NAME, recipe_hash)
    grown: list[list[int]] = [] if found is None else json.loads(found[1]["grown"])
    return grown


def load_run(run: Distillation, folder: Path, recipe_hash: str) -> bool:
    """Take up the run in ``folder``; False where there is none. Raises CheckpointError for one of another recipe."""
    found = _read(folder / NAME, recipe_hash)
    if found is None:
        return False
    tensors, metadata = found
    run.step, run.first_step = int(metadata["step"]), int(metadata["first_step"])
    run.load = tensors.get("load")
    with torch.no_grad():
        _restore(run, tensors)
    return True


def save_splits(splits: Sequence[Split], folder: Path, recipe_hash: str) -> None:
    """Write which neurons are whose, and the first gates. Raises TrainingError."""
    tensors = {
        f"{number}.{name}": tensor.cpu().contiguous()
        for number, split in enumerate(splits)
        for name, tensor in split._asdict().items()
    }
    _write(folder / SPLITS, tensors, {"layers": str(len(splits)), "recipe": recipe_hash})


def load_splits(folder: Path, recipe_hash: str, device: torch.device) -> list[Split] | None:
    """What ``save_splits`` wrote; None where it did not. Raises CheckpointError for those of another recipe."""
    found = _read(folder / SPLITS, recipe_hash)
    if found is None:
        return None
    tensors, metadata = found
    return [
        Split(*(tensors[f"{number}.{name}"].to(device) for name in Split._fields))
        for number in range(int(metadata["layers"]))
    ]


def save_rows(rows: Tokens, folder: Path, recipe_hash: str) -> None:
    """Write what the teacher wrote. Raises TrainingError."""
    _write(folder / ROWS, {"rows": torch.from_numpy(rows.astype(np.int32))}, {"recipe": recipe_hash})


def load_rows(folder: Path, recipe_hash: str) -> Tokens | None:
    """What ``save_rows`` wrote; None where it did not. Raises CheckpointError for those of another recipe."""
    found = _read(folder / ROWS, recipe_hash)
    return None if found is None else found[0]["rows"].numpy().astype(np.uint16)


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = file.with_name(f".{file.name}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
    except (SafetensorError, OSError) as error:
        unfinished.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write {file} ({error}); make room and start again: it goes on where it was"
        ) from None
    unfinished.replace(file)


def _read(file: Path, recipe_hash: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata: dict[str, str] = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 – no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete it to start again") from None
    if metadata.get("recipe") != recipe_hash:
        raise CheckpointError(f"{file} belongs to another recipe; give another --out, or delete it to start again")
    return tensors, metadata


def _restore(run: Distillation, tensors: dict[str, Tensor]) -> None:
    for name, tensor in run.student.parameters().items():
        tensor.copy_(tensors[name])
        if f"exp_avg.{name}" in tensors:
            state = run.optimizer.state[tensor]
            state["step"] = torch.tensor(
                float(run.step - run.first_step), device=tensor.device if tensor.is_cuda else "cpu"
            )
            for moment in _MOMENTS:
                state[moment] = tensors[f"{moment}.{name}"].to(tensor.device)
    for number, layer in enumerate(run.student.layers):
        if layer.router is not None:
            layer.router.bias.copy_(tensors[f"{number}.bias"])
