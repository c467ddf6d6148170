"""A model that is larger than its worker may be: written, quantized, loaded, served with a part of it in memory.

`python -m bench.large` (`make bench-large`): a bfloat16 checkpoint of a shape's random weights, about 13 GB; the memory
that `consilium quantize` takes for it; then one worker without a limit (loaded from files that the system has not in
its cache), and one with `worker.memory_limit` at a share of the int8 checkpoint: with the files in the cache, and cold,
where they are dropped from it all the time, as if they were larger than the machine. The tokens must be the same. With
--parts some of that alone; the other figures are kept as they are in bench/results/large.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from bench.client import events
from bench.machine import describe
from bench.report import RESULTS, write
from tests.stack import Process, running, wait_ready, worker_argv

PARTS = ("write", "quantize", "no limit", "limited", "limited, cold")
PROMPTS = ("The quick brown fox", "Once upon a time in a land far away", "def main(arguments):", "Dear Sir or Madam")
POLL_SECONDS = 0.05
COLD_SECONDS = 0.1  # so often the cache is dropped
TIMEOUT = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status; 1 where tokens differ."""
    options = _parse(arguments)
    machine, figures = describe(), _known(options.parts)
    with _folder(options.folder) as folder:
        for part in options.parts:
            figures[part] = _measure(part, folder, options)
            Console(stderr=True).print(f"{part}: {figures[part]}", soft_wrap=True)
    parameters = {name: getattr(options, name) for name in ("shape", "share", "tokens", "threads")}
    served = [figures[part] for part in PARTS[2:] if part in figures]
    same = len({json.dumps(each["token_ids"]) for each in served}) <= 1
    _print(figures, same=same)
    print(f"written to {write('large', machine, parameters, figures)}", file=sys.stderr)
    return 0 if same else 1


def _measure(part: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    floats, int8 = folder / "bfloat16", folder / "int8"
    if part == "write":
        return _command("model", "random", options.shape, str(floats), "--bfloat16") | {"bytes": _size(floats)}
    if part == "quantize":
        return _command("quantize", str(floats), str(int8)) | {"bytes": _size(int8)}
    limit = int(options.share * _size(int8)) if part.startswith("limited") else None
    return _serve(int8, limit, options, cold=part.endswith("cold"))


def _command(*arguments: str) -> dict[str, Any]:
    """Seconds and peak memory of a `consilium` command. Raises RuntimeError when it fails."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "consilium", *arguments]) as process:
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"consilium {' '.join(arguments)} failed")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def _serve(model: Path, limit: int | None, options: argparse.Namespace, *, cold: bool) -> dict[str, Any]:
    """One worker and a gateway: the first prompt warms up, the others are measured."""
    flags = ["--threads", str(options.threads), "--metrics-port", "0"]
    flags += [] if limit is None else ["--memory-limit", str(limit)]
    _drop(model)
    started = time.perf_counter()
    with running(worker_argv("all", "--model", str(model), *flags)) as worker:
        loaded = time.perf_counter() - started
        gateway = ["gateway", "--model", str(model), "--port", "0", "--threads", str(options.threads)]
        with running([*gateway, "--group-endpoint", f"experts={worker.address}"]) as served:
            wait_ready(served, TIMEOUT)
            with _dropping(model) if cold else _cached(model):
                token_ids, gaps = asyncio.run(_ask(served.address, PROMPTS[:1], options.tokens))
                before = _traffic(worker)
                more, gaps = asyncio.run(_ask(served.address, PROMPTS[1:], options.tokens))
        after = _traffic(worker)
        counted = {name: after[name] - before[name] for name in ("hits", "misses", "read_bytes", "evictions")}
        return {
            "memory_limit": limit,
            "load_seconds": loaded,
            "tokens_per_second": len(gaps) / sum(gaps),
            "hit_rate": counted["hits"] / (counted["hits"] + counted["misses"]),
            **counted,
            "tokens": sum(map(len, more)),
            "experts_bytes_in_memory": after.get("bytes"),
            "worker_peak_bytes": _peak_bytes(worker.pid),
            "token_ids": token_ids + more,
        }


async def _ask(url: str, prompts: Sequence[str], tokens: int) -> tuple[list[list[int]], list[float]]:
    """The tokens of each answer, one after the other, and the seconds between one token and the next."""
    found, gaps = [], []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        for prompt in prompts:
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
            body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
            ids, times = list[int](), list[float]()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for arrival, data in events(response):
                    for choice in json.loads(data).get("choices", ()) if data != b"[DONE]" else ():
                        shown = (choice["logprobs"] or {}).get("tokens", ())
                        ids += [int(token.removeprefix("token_id:")) for token in shown]
                        times += [arrival] * bool(shown)
            found.append(ids)
            gaps += [after - before for before, after in pairwise(times)]
    return found, gaps


def _traffic(worker: Process) -> dict[str, float]:
    text = httpx.get(worker.metrics, timeout=TIMEOUT).raise_for_status().text
    found = re.findall(r"^consilium_expert_service_memory_(\w+?)(?:_total)?\{.*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _peak_bytes(pid: int) -> int:
    """The most a process had in memory, mapped files included; 0 once it has ended."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024


def _drop(folder: Path) -> None:
    """Have the system forget what it keeps of the files in memory (what a process maps and has touched stays)."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _cached(folder: Path) -> Iterator[None]:
    """With all of the files in the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as content:
            while content.read(2**24):
                pass
    yield


@contextmanager
def _dropping(folder: Path) -> Iterator[None]:
    """While the files are dropped from the cache again and again."""
    ended = threading.Event()

    def drop() -> None:
        while not ended.wait(COLD_SECONDS):
            _drop(folder)

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="large-") as name:
        yield Path(name)


def _known(parts: Sequence[str]) -> dict[str, Any]:
    """The figures of other parts, from the last run."""
    file = RESULTS / "large.json"
    if set(parts) == set(PARTS) or not file.is_file():
        return {}
    known = json.loads(file.read_text("utf-8"))["figures"]
    return {part: known[part] for part in PARTS if part in known}


def _print(figures: dict[str, Any], *, same: bool) -> None:
    console = Console()
    for part in ("write", "quantize"):
        if part in figures:
            each = figures[part]
            peak = f"{each['peak_bytes'] / 1e9:.2f} GB at most in memory"
            console.print(f"{part}: {each['bytes'] / 1e9:.1f} GB in {each['seconds']:.0f} s, {peak}")
    columns = ("", "limit", "loaded in", "tok/s", "found in memory", "read a token", "worker at most")
    table = Table(*columns, box=box.SIMPLE_HEAD, caption=f"the same tokens: {'yes' if same else 'NO'}")
    for part in PARTS[2:]:
        if part in figures:
            each = figures[part]
            table.add_row(
                part,
                "-" if each["memory_limit"] is None else f"{each['memory_limit'] / 1e9:.2f} GB",
                f"{each['load_seconds']:.1f} s",
                f"{each['tokens_per_second']:.2f}",
                f"{each['hit_rate']:.3f}",
                f"{each['read_bytes'] / each['tokens'] / 1e6:.0f} MB",
                f"{each['worker_peak_bytes'] / 1e9:.2f} GB",
            )
    console.print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=__doc__)
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the int8 checkpoint, as the memory limit")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="of each answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="T", help="all cores")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--folder", type=Path, metavar="DIR", help="kept; a temporary one by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
