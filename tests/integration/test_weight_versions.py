"""Two versions of the weights behind one router: neither sees the other, and a request stays on its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx

from protos.router.v1 import router_pb2
from tests.integration.completions import Completion, body_of, complete, events
from tests.integration.grpc_client import SECONDS
from tests.integration.test_registration import save_other_weights, settled, states
from tests.integration.test_router_service import router
from tests.stack import Process, launch, running, wait_ready, worker_argv

PROMPT = [5, 17, 99, 40]


def served(cleanup: ExitStack, model: Path, router_address: str, version: str) -> tuple[Process, Process]:
    """A worker and a gateway of one version, ready."""
    common = ["--model", str(model), "--weight-version", version]
    joined = ["--join", router_address, "--speed", "1"]
    worker = cleanup.enter_context(running(worker_argv("all", *common, *joined)))
    asked = ["gateway", *common, "--router", router_address, "--port", "0", "--threads", "1"]
    gateway = cleanup.enter_context(running(asked))
    wait_ready(gateway)
    return worker, gateway


def test_two_versions_are_served_side_by_side(tiny_mixtral: Path, tmp_path: Path) -> None:
    other = save_other_weights(tiny_mixtral, tmp_path / "other")
    with router(tiny_mixtral) as (process, caller), ExitStack() as cleanup:
        old_worker, old = served(cleanup, tiny_mixtral, process.address, "")
        before = complete(old.address, PROMPT, 60)
        stream = events(old.address, body_of(PROMPT, 60, stream=True))
        begun = [next(stream) for _ in range(5)]
        _, new = served(cleanup, other, process.address, "next")
        after = complete(new.address, PROMPT, 60)
        assert after.tokens != before.tokens
        rest = Completion()
        for event in (*begun, *stream):  # it began on the old weights, and ends on them
            rest.add(event)
        rest.assert_same(before)
        complete(old.address, PROMPT, 60).assert_same(before)
        states(caller, settled(1))  # of the version without a name, which knows nothing of the other one
        asked = router_pb2.GetPlacementRequest(weight_version="next")
        found = caller.stub.GetPlacement(asked, timeout=SECONDS)
        assert list(found.weight_versions) == ["", "next"]
        assert len(found.workers) == len(found.gateways) == 1
        wrong = launch(worker_argv("0", "--model", str(other), "--join", process.address))
        assert wrong.wait() == 1
        assert "refused: its weights of expert 0" in wrong.log()
        assert old.stop() == 0  # the old version leaves: its gateways first, then its workers
        assert old_worker.stop() == 0
        assert httpx.get(f"{new.address}/ready").status_code == 200
        complete(new.address, PROMPT, 60).assert_same(after)
