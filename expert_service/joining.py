"""What a worker learns from its router before it is anything: for one that was told an address and nothing else."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import grpc

from consilium.config import Config
from consilium.errors import ConfigError
from consilium.model_folder import ModelFolder, read_model_folder
from consilium.rpc import from_rpc_error, router_channel_options
from consilium.tokens import WORKER, metadata_of
from protos.router.v1 import router_pb2, router_pb2_grpc

logger = logging.getLogger(__name__)

RPC_SECONDS, RETRY_SECONDS = 5.0, 0.5
_WAIT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def complete(config: Config) -> tuple[Config, ModelFolder | None]:
    """The configuration with what the router says where this machine says nothing.

    The model is None where this machine has it, or can make it. Waits for the router. Raises ConfigError.
    """
    endpoint = None if config.router is None else config.router.endpoint
    if endpoint is None or "model" in config.model_fields_set:
        return config, None
    said = _ask(endpoint, config)
    found = {"quantization": said.quantization, "dtype": said.dtype}
    known = {key: value for key, value in found.items() if key not in config.model_fields_set}
    if said.shape:
        return config.model_copy(update={"model": said.shape, **known}), None
    return config.model_copy(update={"model": said.model_fingerprint[:16], **known}), _folder(said)


def _ask(endpoint: str, config: Config) -> router_pb2.GetDeploymentResponse:
    metadata, reported = metadata_of(config.tokens, WORKER), ""
    request = router_pb2.GetDeploymentRequest(weight_version=config.weight_version)
    with grpc.insecure_channel(endpoint.removeprefix("grpc://"), options=router_channel_options()) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        while True:
            try:
                return stub.GetDeployment(request, timeout=RPC_SECONDS, metadata=metadata)
            except grpc.RpcError as error:
                message = from_rpc_error(error).message
                if not isinstance(error, grpc.Call) or error.code() not in _WAIT:
                    raise ConfigError(f"the router at {endpoint}: {message}") from None
                if message != reported:
                    logger.warning("the router at %s cannot be reached: %s", endpoint, message)
                reported = message
            time.sleep(RETRY_SECONDS)


def _folder(said: router_pb2.GetDeploymentResponse) -> ModelFolder:
    """What its config.json says. Raises ConfigError where that is not what the router has."""
    with tempfile.TemporaryDirectory(prefix="consilium-") as name:
        (Path(name) / "config.json").write_text(said.config_json, "utf-8")
        folder = read_model_folder(Path(name))
    if folder.fingerprint != said.model_fingerprint:
        raise ConfigError("the router's config.json has not the fingerprint that it states; is it of another version?")
    return folder
