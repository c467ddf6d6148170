"""What every worker of this deployment must be like, and what is said to one that is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from consilium.config import Config
from consilium.errors import ConfigError, InvalidRequest
from consilium.frames import PROTOCOL_VERSION
from consilium.model_folder import ModelFolder
from consilium.shapes.folder import ShapeFolder
from protos.expert.v1 import expert_pb2
from protos.router.v1 import router_pb2
from protos.tensor.v1 import tensor_pb2
from router_service.holdings import hashes_of

HASH_BYTES = 16
MOST_CAPACITY = 2**24
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Deployment:
    """The model and the arithmetic that the router was started for."""

    model_fingerprint: str
    quantization: str
    row_dtype: tensor_pb2.Dtype.ValueType
    hidden_size: int
    layers: tuple[int, ...]  # those that route
    experts: int  # in each of them
    mixed_numerics: bool = False
    dtype: str = "float32"  # of what is not int8
    shape: str = ""  # its name, where the model is one
    config_json: str = ""

    def describe(self) -> router_pb2.GetDeploymentResponse:
        """For a worker that knows nothing yet."""
        return router_pb2.GetDeploymentResponse(
            shape=self.shape,
            config_json=self.config_json,
            model_fingerprint=self.model_fingerprint,
            quantization=self.quantization,
            dtype=self.dtype,
        )

    def check(self, record: router_pb2.WorkerRecord, others: Iterable[router_pb2.WorkerRecord]) -> None:
        """Raises ConfigError that says what differs, InvalidRequest for a message that makes no sense."""
        worker, said = record.worker, record.worker.description
        if not said.worker_id or not _ADDRESS.fullmatch(worker.address) or worker.capacity > MOST_CAPACITY:
            raise InvalidRequest("a worker must name its id, its address as HOST:PORT, and its capacity")
        for what, ours, theirs in (
            ("protocol version", PROTOCOL_VERSION, said.protocol_version),
            ("model fingerprint", self.model_fingerprint[:16], said.model_fingerprint[:16]),
            ("quantization", self.quantization, said.quantization),
            ("dtype", _dtype_name(self.row_dtype), _dtype_name(said.row_dtype)),
            ("hidden size", self.hidden_size, said.hidden_size),
        ):
            if ours != theirs:
                raise ConfigError(f"refused: its {what} is {theirs}, this deployment's is {ours}; start both alike")
        known = list(others)
        self._check_numerics(said, known)
        self.check_held(record.held, known)

    def check_held(self, held: Iterable[expert_pb2.LayerExperts], others: Iterable[router_pb2.WorkerRecord]) -> None:
        """Raises ConfigError for weights that differ from another worker's, InvalidRequest for impossible experts."""
        layers = set(self.layers)
        for each in held:
            fits = len(each.experts) == len(each.hashes) and all(len(digest) == HASH_BYTES for digest in each.hashes)
            if not fits or each.layer not in layers or any(expert >= self.experts for expert in each.experts):
                raise InvalidRequest(f"the experts held in layer {each.layer} are not those of this model")
        mine = hashes_of(held)
        for other in others:
            theirs = hashes_of(other.held)
            for expert in sorted(mine.keys() & theirs.keys()):
                if mine[expert] != theirs[expert]:
                    raise ConfigError(
                        f"refused: its weights of expert {expert[1]} of layer {expert[0]} have the hash "
                        f"{mine[expert].hex()}, those of {other.worker.address} have {theirs[expert].hex()}; "
                        "give both the same model folder"
                    )

    def _check_numerics(self, said: expert_pb2.DescribeResponse, others: list[router_pb2.WorkerRecord]) -> None:
        classes = {each.worker.description.numerics_class for each in others}
        if classes and said.numerics_class not in classes and not self.mixed_numerics:
            raise ConfigError(
                f"refused: its numerics class is {said.numerics_class}, the others' is {', '.join(sorted(classes))}: "
                "answers would depend on who computes them; set router.mixed_numerics: true to take it all the same"
            )


def deployment_of(config: Config, folder: ModelFolder) -> Deployment:
    """What the configuration and the model's config.json ask for. Raises ConfigError for a model without experts."""
    model = folder.config
    if not model.expert_layers():
        raise ConfigError(f"{config.model} has no layer with experts; there is nothing to place")
    dtype = tensor_pb2.DTYPE_BFLOAT16 if config.reply_dtype == "bfloat16" else tensor_pb2.DTYPE_FLOAT32
    return Deployment(
        folder.fingerprint,
        config.quantization,
        dtype,
        model.hidden_size,
        tuple(model.expert_layers()),
        model.num_experts,
        config.router is not None and config.router.mixed_numerics,
        config.dtype,
        str(folder.path) if isinstance(folder.path, ShapeFolder) else "",
        json.dumps(folder.raw),
    )


def _dtype_name(code: tensor_pb2.Dtype.ValueType) -> str:
    return tensor_pb2.Dtype.Name(code) if code in tensor_pb2.Dtype.values() else str(code)
