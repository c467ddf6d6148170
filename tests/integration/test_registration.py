"""Workers under a real router: they join with nothing, load while they serve, and leave without loss."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from consilium.frames import encode_call
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.router.v1 import router_pb2
from router_service.holdings import pairs_of
from tests.integration.grpc_client import SECONDS, Conversation, connected, make_frame
from tests.integration.test_router_service import EVERYTHING, Caller, argv, calling
from tests.stack import Process, launch, running, worker_argv

HIDDEN = 64


@contextmanager
def router(model: Path, *arguments: str, port: int = 0) -> Iterator[tuple[Process, Caller]]:
    settings = ["--quantization", "none", "--port", str(port), *arguments]
    with running(argv(model, *settings)) as process, calling(process, model) as caller:
        yield process, caller


def joining(model: Path, address: str, *arguments: str) -> list[str]:
    common = ("--model", str(model), "--quantization", "none", "--join", address, "--speed", "1")
    return worker_argv("all", *common, *arguments)


def save_other_weights(model: Path, folder: Path) -> Path:
    """The same model, but for the signs of its experts' weights."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: -each if "expert" in name else each for name, each in tensors.items()}, file)
    return folder


def held_by(worker: Process) -> frozenset[tuple[int, int]]:
    with connected(worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        return pairs_of(stub.Describe(expert_pb2.DescribeRequest(), timeout=SECONDS).layers)


def states(caller: Caller, until: Callable[[router_pb2.GetPlacementResponse], bool]) -> router_pb2.GetPlacementResponse:
    """What the router says, asked until it is as wanted."""
    deadline = time.monotonic() + SECONDS
    while not until(found := caller.state()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def settled(count: int) -> Callable[[router_pb2.GetPlacementResponse], bool]:
    """So many workers hold exactly what they shall, which together is everything."""
    return lambda found: (
        len(found.workers) == count
        and found.missing == 0
        and all(each.held == each.wanted > 0 for each in found.workers)
    )


def test_workers_join_with_nothing_leave_without_loss_and_outlive_their_router(tiny_mixtral: Path) -> None:
    with ExitStack() as cleanup:
        with router(tiny_mixtral) as (process, caller):
            port = int(process.address.rsplit(":", 1)[1])
            stays = cleanup.enter_context(running(joining(tiny_mixtral, process.address)))
            states(caller, settled(1))
            with running(joining(tiny_mixtral, process.address)) as leaves:
                states(caller, settled(2))
                assert held_by(leaves)
                assert leaves.stop() == 0
                assert "nobody else holds" not in leaves.log()
            assert [each.held for each in states(caller, settled(1)).workers] == [len(EVERYTHING)]
            process.stop(signal.SIGKILL)
        assert held_by(stays) == set(EVERYTHING)
        with router(tiny_mixtral, port=port) as (_, caller):
            assert states(caller, settled(1)).placement.epoch


def test_a_worker_that_finds_no_router_can_be_stopped(tiny_mixtral: Path) -> None:
    worker = launch(joining(tiny_mixtral, "grpc://127.0.0.1:1"))
    while "cannot be reached" not in worker.log():
        assert worker.popen.poll() is None, worker.log()
        time.sleep(0.02)
    assert worker.stop() == 0


def test_workers_that_do_not_fit_are_refused_and_those_without_room_get_nothing(
    tiny_mixtral: Path, tmp_path: Path
) -> None:
    other = save_other_weights(tiny_mixtral, tmp_path / "other")
    with router(tiny_mixtral) as (process, caller), running(joining(tiny_mixtral, process.address)):
        states(caller, settled(1))
        wrong = launch(joining(other, process.address, "--experts", "0"))
        quantized = launch([*joining(tiny_mixtral, process.address), "--quantization", "int8"])
        assert wrong.wait() == 1
        assert "refused: its weights of expert 0 of layer 0 have the hash" in wrong.log()
        assert "Traceback" not in wrong.log()
        assert quantized.wait() == 1
        assert "refused: its quantization is int8, this deployment's is none" in quantized.log()
        with running(joining(tiny_mixtral, process.address, "--memory", "1")) as small:
            found = states(caller, lambda each: len(each.workers) == 2)
            assert sorted(each.worker.capacity for each in found.workers) == [0, len(EVERYTHING)]
            assert not held_by(small)


def test_a_hot_expert_gains_a_copy_while_calls_are_answered(
    tiny_mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "CONSILIUM_ROUTER__REBALANCE": "300ms",
        "CONSILIUM_ROUTER__LOAD_HALF_LIFE": "1s",
    }
    monkeypatch.setattr("tests.stack._environment", lambda: {**os.environ, **settings})
    with (
        router(tiny_mixtral) as (process, caller),
        running(joining(tiny_mixtral, process.address, "--experts", "0-1", *room(9))) as first,
        running(joining(tiny_mixtral, process.address, "--experts", "2-3", *room(9))) as second,
        connected(first.address) as channel,
    ):
        states(caller, settled(2))
        stream, number = Conversation(channel), 0
        for hot in (0, 3, 1):
            while True:
                number += 1
                caller.report([1000 if expert == hot else 10 for expert in range(4)])
                answer = stream.ask(encode_call(make_frame(HIDDEN, 0, [hot], 3), number, 0))
                assert answer.HasField("result") or answer.error.code == "FAILED_PRECONDITION", answer.error.message
                if (0, hot) in held_by(first) & held_by(second):
                    break
        stream.finish()


def room(experts: int) -> list[str]:
    """For so many experts: 3 matrices of 64 × 48 in float32 each."""
    return ["--memory", str(experts * 3 * HIDDEN * 48 * 4)]
