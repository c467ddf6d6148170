"""A worker in a network namespace of its own, as in a container: what it shares with the gateway's decides the way.

Needs root, and iproute2. Abstract sockets are seen in their own namespace alone; a folder is seen where it is
mounted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.completions import complete
from tests.stack import Process, running, wait_ready, worker_argv
from tests.system.namespace import Namespace, joined
from tests.tiny_models import save_mixtral

HIDE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')  # FOLDER COMMAND...


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with joined() as namespace:
        yield namespace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("model"))


def served(worker: Process, host: str, model: Path, token: Path) -> tuple[dict[str, Any], list[int], str]:
    """What a gateway outside says of the worker, the tokens it answers with, and its log."""
    endpoint = worker.address.replace("0.0.0.0", host)
    argv = ["gateway", "--model", str(model), "--port", "0", "--threads", "1", "--token-file", str(token)]
    with running([*argv, "--group-endpoint", f"experts={endpoint}"]) as gateway:
        wait_ready(gateway)
        tokens = complete(gateway.address, list(range(40, 70)), 8).tokens
        (found,) = httpx.get(f"{gateway.address}/load", timeout=30).json()["workers"]
        return found, tokens, gateway.log()


def test_the_folder_is_the_way_where_it_is_shared_and_grpc_elsewhere(
    namespace: Namespace, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("s")  # a socket's path has room for 107 bytes
    config = tmp_path / "consilium.yaml"
    token = tmp_path / "token"
    token.write_text("the-word-of-a-gateway")
    config.write_text(f"worker: {{socket_folder: {folder}}}\ntokens: {{gateway_file: {token}}}\n")
    argv = worker_argv("all", "--model", str(model), "--host", "0.0.0.0", "--config", str(config))
    with running(argv, prefix=namespace.inside) as worker:
        shared, expected, _ = served(worker, namespace.theirs, model, token)
    with running(argv, prefix=(*namespace.inside, *HIDE, str(folder))) as worker:
        hidden, tokens, log = served(worker, namespace.theirs, model, token)
    assert (shared["transport"], shared["detail"]) == ("local", "")
    assert hidden["transport"] == "grpc"
    for said in (hidden["detail"], log):
        assert "over gRPC alone: @consilium-" in said
        assert "Connection refused" in said
        assert f"{folder}/" in said
        assert "No such file" in said
    assert tokens == expected != []
