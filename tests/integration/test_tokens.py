"""A deployment whose services listen to the network: who shows what, and who is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from consilium.tokens import read_token, token_metadata
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from tests.integration.completions import complete
from tests.integration.grpc_client import SECONDS, connected
from tests.integration.test_router_service import argv
from tests.stack import launch, running, wait_ready, worker_argv


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {role: tmp_path / role for role in ("worker", "gateway")}
    command = [sys.executable, "-m", "consilium", "token", *map(str, found.values())]
    assert "a secret was written" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept = [file.read_text() for file in found.values()]
    subprocess.run(command, check=True)
    assert [file.read_text() for file in found.values()] == kept  # what is there stays
    assert all(file.stat().st_mode & 0o077 == 0 for file in found.values())
    return found


def refusal(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_a_deployment_with_tokens_serves_and_answers_nobody_else(tiny_mixtral: Path, files: dict[str, Path]) -> None:
    both = [part for role, file in files.items() for part in (f"--{role}-token-file", str(file))]
    common = ["--model", str(tiny_mixtral), "--host", "0.0.0.0"]
    with running(argv(tiny_mixtral, "--host", "0.0.0.0", *both)) as router:
        joined = ["--join", router.address.replace("0.0.0.0", "127.0.0.1"), "--token-file", str(files["worker"])]
        with running(worker_argv("all", *common, *joined)) as worker:
            asking = ["--router", joined[1], "--token-file", str(files["gateway"])]
            plain = ["gateway", "--model", str(tiny_mixtral), "--port", "0", "--threads", "1"]
            with running([*plain, *asking]) as gateway:
                wait_ready(gateway)
                assert len(complete(gateway.address, [5, 6, 7], 4).tokens) == 4
            address = worker.address.replace("0.0.0.0", "127.0.0.1")
            with connected(address) as channel:
                stub = expert_pb2_grpc.ExpertServiceStub(channel)
                shown = {role: token_metadata(read_token(file, role)) for role, file in files.items()}
                once, described = expert_pb2.ForwardOnceRequest(), expert_pb2.DescribeRequest()
                for metadata, code in (
                    (shown["worker"], grpc.StatusCode.PERMISSION_DENIED),
                    (None, grpc.StatusCode.UNAUTHENTICATED),
                ):
                    assert refusal(partial(stub.ForwardOnce, once, timeout=SECONDS, metadata=metadata)) is code
                    stream = stub.Forward(iter(()), timeout=SECONDS, metadata=metadata)
                    assert refusal(partial(next, stream)) is code
                assert refusal(lambda: stub.Describe(described, timeout=SECONDS)) is grpc.StatusCode.UNAUTHENTICATED
                assert stub.Describe(described, timeout=SECONDS, metadata=shown["gateway"]).worker_id


def test_without_a_token_a_worker_stays_on_loopback(tiny_mixtral: Path) -> None:
    worker = launch(worker_argv("all", "--model", str(tiny_mixtral), "--host", "0.0.0.0"))
    assert worker.wait() == 1
    assert "tokens.gateway_file: a worker that listens on 0.0.0.0 answers only to gateways" in worker.log()


def test_a_worker_that_listens_to_the_network_refuses_a_router_without_tokens(tiny_mixtral: Path) -> None:
    with running(argv(tiny_mixtral)) as router:
        worker = launch(worker_argv("all", "--model", str(tiny_mixtral), "--host", "0.0.0.0", "--join", router.address))
        assert worker.wait() == 1
        assert "the router asks for none; give it secrets" in worker.log()
