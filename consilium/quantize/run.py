"""`consilium quantize`: a float model folder becomes a complete int8 one, or one that says it is not finished."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.compressed_tensors import quantization_config
from consilium.errors import CheckpointError, ConfigError
from consilium.families import SMOOTHED
from consilium.formats.scheme import INT4_GROUP
from consilium.model_folder import UNFINISHED
from consilium.models import is_model_folder
from consilium.quantize.calibration import STRENGTHS, calibrate_head, calibrate_layer, embed
from consilium.quantize.float_layer import FloatLayer
from consilium.quantize.layer_tensors import Shard, embedding_shard, head_shard, layer_shard
from consilium.quantize.plain import check_separate, write_plain
from consilium.quantize.text import FEWEST_TOKENS, MOST_TOKENS, calibration_text, encode_text
from consilium.quantize.unfinished import Progress
from consilium.tensor_files import PICKLE_PATTERNS

# Raise it when the same input would be written differently: an unfinished run of another number is not taken up.
VERSION = 1
# What is written anew, or belongs to the float weights; everything else in the folder is copied.
NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "provenance.json", ".*", *PICKLE_PATTERNS)


def quantize(
    model: Path,
    out: Path,
    text: Path | None = None,
    *,
    int4: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> None:
    """Write the model in folder ``model`` to ``out`` in int8, or with its experts in ``int4``.

    An interrupted run is taken up where it stopped.

    Raises ConfigError and CheckpointError that say what is wrong and what to do.
    """
    console = console or Console(stderr=True)
    checkpoint = Checkpoint(model)
    if checkpoint.int8:
        raise CheckpointError(f"{model} is int8 already; give the float checkpoint it was made from")
    tokens = None
    if checkpoint.config.family in SMOOTHED:
        vocabulary = checkpoint.config.vocab_size
        tokens = encode_text(model, vocabulary, calibration_text(text), FEWEST_TOKENS, MOST_TOKENS)
    else:
        check_separate(checkpoint)
        console.print(f"{checkpoint.config.family} models are not smoothed: their experts are rounded", soft_wrap=True)
    _prepare_folder(model, out, force=force)
    files = checkpoint.config.num_layers + (1 if tokens is None else 2)
    progress = Progress(out, _settings(model, checkpoint, tokens, int4=int4), files)
    if progress.done:
        console.print(f"going on after {progress.done} of {files} files", soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProgressBar(*columns, console=console) as bar, torch.inference_mode():
        task = bar.add_task("quantizing", total=files, completed=progress.done)
        if tokens is None:
            write_plain(checkpoint, progress, lambda: bar.advance(task), int4=int4)
        else:
            _write_shards(checkpoint, tokens, progress, lambda: bar.advance(task), int4=int4)
    _copy_others(model, out)
    progress.finish(_config(checkpoint, int4=int4, smoothed=tokens is not None))
    hint = ", serve it with --quantization int4" if int4 else ""
    console.print(f"the {'int4' if int4 else 'int8'} model is in {out}{hint}", soft_wrap=True)


def _config(checkpoint: Checkpoint, *, int4: bool, smoothed: bool) -> dict[str, Any]:
    """config.json of what was written."""
    group = INT4_GROUP if int4 else None
    if not smoothed:
        return {**checkpoint.raw, "quantization_config": quantization_config([], group, experts_alone=True)}
    router, layers = checkpoint.names.router, checkpoint.config.expert_layers()
    routers = [router.format(layer=layer).removesuffix(".weight") for layer in layers]
    return {**checkpoint.raw, "tie_word_embeddings": False, "quantization_config": quantization_config(routers, group)}


def _write_shards(
    checkpoint: Checkpoint, tokens: list[int], progress: Progress, advance: Callable[[], None], *, int4: bool
) -> None:
    """The embedding, every layer, and the head: each a shard, calibrated on what the ones before it computed."""
    layers = checkpoint.config.num_layers

    def add(shard: Shard, hidden: Tensor | None) -> None:
        progress.add(shard, hidden)
        progress.hidden = hidden
        checkpoint.release()
        advance()

    if progress.done == 0:
        add(embedding_shard(checkpoint), embed(checkpoint, tokens))
    for number in range(progress.done - 1, layers):
        layer = FloatLayer(checkpoint, number)
        moved, hidden = calibrate_layer(layer, _hidden(progress))
        add(layer_shard(checkpoint, layer, moved, int4=int4), hidden)
    if progress.done == layers + 1:
        add(head_shard(checkpoint, calibrate_head(checkpoint, _hidden(progress))), None)


def _hidden(progress: Progress) -> Tensor:
    if progress.hidden is None:
        raise AssertionError("every shard but the last leaves hidden states")
    return progress.hidden


def _settings(model: Path, checkpoint: Checkpoint, tokens: list[int] | None, *, int4: bool) -> dict[str, Any]:
    """What a run's output depends on: equal settings give equal shards."""
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in model.glob("*.safetensors")]
    return {
        "version": VERSION,
        "model": checkpoint.fingerprint,
        "weights": sorted(weights),
        "tokens": None if tokens is None else hashlib.sha256(str(tokens).encode()).hexdigest(),
        "strengths": list(STRENGTHS),
        "experts": "int4" if int4 else "int8",
    }


def _prepare_folder(model: Path, out: Path, *, force: bool) -> None:
    """Make way for the output, or raise ConfigError: only what looks like a model is ever deleted."""
    if out.resolve() == model.resolve():
        raise ConfigError(f"{out} is the model itself; give another folder for the int8 model")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = (out / UNFINISHED).is_file()
    if not ours and not (out.is_dir() and is_model_folder(out)):
        raise ConfigError(f"{out} exists and is no model folder; give another one")
    if force:
        shutil.rmtree(out)
    elif not ours:
        raise ConfigError(f"{out} holds a model already; give another folder, or replace it with --force")


def _copy_others(model: Path, out: Path) -> None:
    """Tokenizer, templates, licences: everything that is neither weights nor config.json."""
    for file in sorted(model.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, out / file.name)
