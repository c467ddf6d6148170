"""What `consilium inspect` says of a model: as plain data, and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from consilium.inspect.parts import count_active, count_parameters
from consilium.inspect.served import MODES, Mode, cache_bytes, served_bytes
from consilium.inspect.split import Need, Share, suggest_split, usable
from consilium.inspect.stored import stored_bytes, stored_tensors
from consilium.local_stack import ranges
from consilium.memory import usable_memory
from consilium.model_folder import ModelFolder


def inspect(
    model: ModelFolder, name: str, mode: Mode, cache: int, memory: Sequence[int], machines: Sequence[int]
) -> dict[str, Any]:
    """Everything, in bytes. ``cache``: of keys and values; ``memory``: machines that a whole model may fit.

    Raises CheckpointError (damaged files), ConfigError (``machines`` are too small).
    """
    config, tensors = model.config, stored_tensors(model)
    stored = None if tensors is None else stored_bytes(tensors, model.family.names, config.num_layers)
    latent = 2 if stored and set(stored.get("attention", ())) <= {"BF16"} else 4
    modes = [each._replace(group=model.int4_group) for each in MODES if not model.int8 or each.quantization != "none"]
    needs = {each: _need(model, each, cache, latent) for each in modes}
    found: dict[str, Any] = {
        "model": name,
        "architecture": _architecture(model),
        "parameters": {
            "total": sum(count_parameters(config).values()),
            "active": count_active(config),
            "groups": count_parameters(config),
        },
        "stored": stored,
        "served": [
            {
                "quantization": each.quantization,
                "dtype": each.dtype,
                "groups": served_bytes(config, each, latent),
                "gateway": need.gateway,
                "experts": need.expert * need.experts,
                "one_machine": need.total,
                "cache_per_token": cache_bytes(config, each),
                "fits": {str(size): need.total <= usable(size) for size in (memory or [usable_memory()])},
            }
            for each, need in needs.items()
        ],
    }
    if machines:
        shares = suggest_split(_need(model, mode, cache, latent), machines)
        found["split"] = {"mode": str(mode), "machines": [_share(share, name, mode) for share in shares]}
    return found


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print what ``inspect`` found."""
    parameters = found["parameters"]
    console.print(f"[bold]{found['model']}[/bold]: " + ", ".join(f"{k} {v}" for k, v in found["architecture"].items()))
    console.print(f"{_count(parameters['total'])} parameters, {_count(parameters['active'])} of them active in a token")
    console.print(_groups(found))
    console.print(_fits(found))
    if "split" in found:
        console.print(_split(found["split"]))


def _architecture(model: ModelFolder) -> dict[str, Any]:
    config = model.config
    return {
        "family": config.family,
        "layers": config.num_layers,
        "routed_layers": len(config.expert_layers()),
        "experts": config.num_experts,
        "top_k": config.top_k,
        "hidden_size": config.hidden_size,
        "expert_size": config.expert_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position,
        "attention": "latent" if config.latent else f"{config.num_heads}/{config.num_kv_heads} heads",
    }


def _need(model: ModelFolder, mode: Mode, cache: int, latent: int) -> Need:
    groups = served_bytes(model.config, mode, latent)
    experts = groups["experts"]
    return Need(sum(groups.values()) - experts + cache, experts // model.config.num_experts, model.config.num_experts)


def _share(share: Share, name: str, mode: Mode) -> dict[str, Any]:
    flags = f"--model {name}"
    flags += "" if mode.quantization == "int8" else f" --quantization {mode.quantization}"
    flags += "" if mode.dtype == "float32" else f" --dtype {mode.dtype}"
    held = ranges(share.experts)
    commands = [f"consilium gateway {flags}"] if share.gateway else []
    commands += [f"consilium expert {flags} --experts {held}"] if share.experts else []
    return {"memory": share.memory, "used": share.used, "gateway": share.gateway, "experts": held, "run": commands}


def _groups(found: Mapping[str, Any]) -> Table:
    table = Table("group", "parameters", "as stored", *(f"{s['quantization']}\n{s['dtype']}" for s in found["served"]))
    counts, stored = found["parameters"]["groups"], found["stored"]
    for group in dict.fromkeys((*counts, *(stored or ()), *found["served"][-1]["groups"])):
        dtypes = (stored or {}).get(group, {})
        on_disk = "\n".join(f"{_size(nbytes)} {dtype}" for dtype, nbytes in sorted(dtypes.items()))
        served = [_size(each["groups"][group]) if group in each["groups"] else "" for each in found["served"]]
        table.add_row(group, _count(counts[group]) if group in counts else "", on_disk, *served)
    return table


def _fits(found: Mapping[str, Any]) -> Table:
    sizes = list(found["served"][0]["fits"])
    table = Table("served as", "gateway", "experts", "on one machine", *(f"fits {_size(int(size))}" for size in sizes))
    for each in found["served"]:
        fits = ["yes" if each["fits"][size] else "no" for size in sizes]
        amounts = [_size(each[key]) for key in ("gateway", "experts", "one_machine")]
        table.add_row(f"{each['quantization']}, {each['dtype']}", *amounts, *fits)
    return table


def _split(split: Mapping[str, Any]) -> Table:
    table = Table("machine", "used", "runs", title=f"a split for {split['mode']}")
    for each in split["machines"]:
        table.add_row(_size(each["memory"]), _size(each["used"]), "\n".join(each["run"]) or "nothing: it is spare")
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 10**9 else f"{number / 1e6:.2f} M"
