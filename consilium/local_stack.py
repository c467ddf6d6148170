"""What `consilium up` runs, as plain data: which worker holds which experts, and the command of every process.

Letters: E experts in a layer, N workers, R copies of every expert.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from consilium.config import Config
from consilium.errors import ConfigError

DEFAULT_GROUP = "experts"


@dataclass(frozen=True, slots=True)
class LocalWorker:
    """One expert worker on this machine."""

    name: str
    group: str
    experts: list[int]  # the ones it holds in every layer
    threads: int


def assign_experts(experts: int, workers: int, replicas: int) -> list[list[int]]:
    """The experts of each of N workers, ascending: R copies of every expert, no worker with two copies of one.

    The sequence 0…E-1, written R times, is cut into N pieces whose lengths differ by at most one. A piece is never
    longer than E because R ≤ N, so it never meets the same expert twice.
    Raises ConfigError when the numbers cannot be met.
    """
    if replicas > workers:
        raise ConfigError(
            f"--replicas {replicas}: {workers} workers can hold at most {workers} copies; use --workers {replicas}"
        )
    copies = experts * replicas
    if workers > copies:
        raise ConfigError(
            f"--workers {workers}: there are only {copies} experts to hold in a layer ({experts} × {replicas} copies); "
            f"use --workers {copies}, or more --replicas"
        )
    cuts = [copies * worker // workers for worker in range(workers + 1)]
    return [sorted(item % experts for item in range(cuts[i], cuts[i + 1])) for i in range(workers)]


def plan_workers(config: Config, experts: int, workers: int, replicas: int, cores: int) -> list[LocalWorker]:
    """The workers of a local stack. Groups named in the configuration get neighbouring workers, as evenly as may be.

    Raises ConfigError when there are fewer workers than groups, or the experts cannot be shared as asked.
    """
    groups = list(config.experts) or [DEFAULT_GROUP]
    if workers < len(groups):
        raise ConfigError(
            f"--workers {workers}: the configuration has {len(groups)} groups ({', '.join(groups)}), "
            f"and each needs a worker; use --workers {len(groups)}"
        )
    threads = config.worker.threads or max(1, cores // workers)
    return [
        LocalWorker(f"worker-{index}", groups[index * len(groups) // workers], held, threads)
        for index, held in enumerate(assign_experts(experts, workers, replicas))
    ]


def router_command(shared: Sequence[str], replicas: int, patience: float) -> list[str]:
    """The router's command line, on a loopback port of the system's choice. The workers may take ``patience`` to load.

    Until then it tells none of them to load what another one is about to bring.
    """
    place = ["--host", "127.0.0.1", "--port", "0", "--replicas", str(replicas), "--patience", f"{patience:g}s"]
    return [sys.executable, "-m", "router_service", *shared, *place]


def worker_command(
    worker: LocalWorker, shared: Sequence[str], *, metrics: bool = False, router: str | None = None
) -> list[str]:
    """The worker's command line, on loopback ports of the system's choice, one more for its metrics if wanted.

    It holds what it is planned to hold, until a ``router`` says otherwise.
    """
    held = ",".join(map(str, worker.experts))
    place = ["--host", "127.0.0.1", "--port", "0", "--group", worker.group, "--layers", "all", "--experts", held]
    ports = ["--metrics-port", "0"] if metrics else []
    ports += [] if router is None else ["--join", router, "--speed", "1"]  # they have the same cores and threads
    return [sys.executable, "-m", "expert_service", *shared, *place, *ports, "--threads", str(worker.threads)]


def gateway_command(
    config: Config, groups: Sequence[tuple[str, str]], threads: int, shared: Sequence[str], router: str | None = None
) -> list[str]:
    """The gateway's command line; ``groups`` are pairs of a group's name and the address of one of its workers.

    With a ``router`` it learns from there where they are.
    """
    command = [sys.executable, "-m", "gateway", *shared]
    command += ["--host", config.gateway.host, "--port", str(config.gateway.port), "--threads", str(threads)]
    if router is not None:
        return [*command, "--router", router]
    for group, address in groups:
        command += ["--group-endpoint", f"{group}={address}"]
    return command


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that hold a process to ``threads`` compute threads.

    Gateway and workers take turns at the same cores within every layer: threads that spin while they wait would keep
    the others from them.
    """
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**dict.fromkeys(names, count), "OMP_WAIT_POLICY": "PASSIVE"}


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
