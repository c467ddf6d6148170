"""The configuration of a deployment: its schema, and how file, environment and command line become one.

Order of precedence: command line, environment (``CONSILIUM_GATEWAY__PORT``), YAML file, defaults.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from consilium.config_sources import assign, read_environment, read_yaml
from consilium.errors import ConfigError
from consilium.units import Duration, Size

ENDPOINT_SCHEME = "grpc://"
_ENDPOINT = re.compile(re.escape(ENDPOINT_SCHEME) + r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")

Quantization = Literal["none", "int8", "int8-weight-only", "int4"]
DenseQuantization = Literal["none", "int8"]
LastReplica = Literal["fail", "wait", "local", "renormalise"]
RowDType = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda", "auto"]


class Section(BaseModel):
    """One mapping in the YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_surprises(cls, value: object, info: ValidationInfo) -> object:
        """A section with nothing below it is all defaults; `yes` where a number belongs would count as 1."""
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        if value is None and (get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Section))):
            return {}
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("true and false mean nothing here")
        return value


class AdaptiveK(Section):
    """Fewer experts for tokens whose gate is sure: what the others would add is left out."""

    mass: float = Field(gt=0, le=1, description="share of a token's gate weights that its experts must have")
    min: int = Field(1, ge=1, description="experts that every token gets")
    max: int | None = Field(None, ge=1, description="most experts of a token; as many as the model chooses by default")


class GatewayConfig(Section):
    """The gateway: the address it listens on, and how much it takes on at once."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 lets the system choose")
    served_model_name: str | None = Field(None, description="the name clients use; the model's own by default")
    api_keys: tuple[SecretStr, ...] = Field((), description="accepted bearer keys; none means no key is asked for")
    max_running: int = Field(64, ge=1, le=4096, description="most sequences in one step")
    max_waiting: int = Field(256, ge=0, le=65536, description="most sequences queued; more are answered with 429")
    max_model_len: int | None = Field(None, ge=1, description="most tokens of prompt and completion together")
    max_step_tokens: int = Field(512, ge=1, le=8192, description="most tokens computed in one step")
    kv_cache_memory: Size = Field(2 * 2**30, ge=2**20, description="memory for keys and values")
    device: Device = Field(
        "cpu", description="where attention is computed: cpu, cuda, or auto: a GPU where there is one that can"
    )
    kv_cache_device_memory: Size | None = Field(
        None, ge=2**20, description="memory of a GPU for keys and values; most of what the model leaves by default"
    )
    batch_invariant: bool = Field(
        True, description="on a GPU, a request's bits do not depend on what is computed beside it, at some cost"
    )
    local_experts: bool = Field(False, description="compute every expert in the gateway; no workers are asked")
    prefix_cache: bool = Field(True, description="keep them for requests that begin alike, as long as there is room")
    # More than 24 days are more milliseconds than epoll can wait for, and 49 more than a call can say.
    layer_timeout: Duration = Field(
        60.0, gt=0, le=86_400, description="most time a layer waits for its experts, with retries"
    )
    last_replica: LastReplica = Field(
        "fail",
        description="when nobody holds an expert: fail the request, wait until layer_timeout, compute it here (local), "
        "or leave it out (renormalise)",
    )
    hedging: float = Field(0.05, ge=0, le=1, description="share of frames that a second worker may be asked for, too")
    audit: float = Field(0.001, ge=0, le=1, description="share of frames that two workers compute, to compare them")
    ejection_time: Duration = Field(
        30.0, gt=0, le=86_400, description="how long a worker that keeps failing is left alone at first"
    )
    threads: int | None = Field(None, ge=1, description="compute threads of the engine; all cores by default")
    dense_quantization: DenseQuantization | None = Field(
        None,
        description="arithmetic of the projections and the head; int8 by default where experts get int8 rows",
    )
    metrics_all_experts: bool = Field(False, description="a series for every (layer, expert), not for 20 and the rest")
    micro_batches: int | None = Field(
        None, ge=1, le=2, description="batches of a step that take turns with the workers; by default what is faster"
    )
    adaptive_k: AdaptiveK | None = Field(None, description="ask fewer experts where they have most of the weight")
    capacity_factor: float | None = Field(
        None, ge=1, description="most tokens of an expert and batch, times the even share; the rest go to the next-best"
    )
    local_links: bool = Field(True, description="pass frames to workers on this host without gRPC")
    drain_timeout: Duration = Field(30.0, ge=0, description="how long running requests may go on after SIGTERM")

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(key.get_secret_value().strip() for key in keys):
            raise ValueError("a key is empty: is a variable not set? Leave the list empty to ask for no key")
        return keys


class ExpertGroupConfig(Section):
    """One group of expert workers, as the gateway reaches it. Several addresses are replicas."""

    endpoint: str | tuple[str, ...] = Field(description="grpc://HOST:PORT, or a list of them")
    max_batch: int = Field(4096, ge=1, le=2**20, description="most rows of one compute batch in a worker")
    timeout: Duration = Field(30.0, gt=0, description="most time for one compute batch; a larger frame gets more")

    @field_validator("endpoint", mode="before")
    @classmethod
    def _check_endpoint(cls, value: object) -> object:
        endpoints = value if isinstance(value, list | tuple) else [value]
        if not endpoints or not all(isinstance(endpoint, str) for endpoint in endpoints):
            raise ValueError("expected grpc://HOST:PORT, or a list of them")
        for endpoint in endpoints:
            split_endpoint(str(endpoint))
        return value

    @property
    def endpoints(self) -> tuple[str, ...]:
        return (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint


class WorkerConfig(Section):
    """One expert worker process."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0 lets the system choose")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="serves metrics on it; 0: the system's choice")
    group: str = Field("experts", min_length=1, description="its entry under `experts:`")
    layers: str = Field("all", description="layers it holds: all, or for example 0-11,13")
    experts: str = Field("all", description="experts it holds in each of them: all, or for example 0-3,7")
    threads: int | None = Field(None, ge=1, description="compute threads; all cores by default")
    device: Device = Field("cpu", description="where it computes: cpu, cuda, or auto: a GPU where there is one")
    max_queue: int = Field(1024, ge=1, description="most calls waiting; more are answered with RESOURCE_EXHAUSTED")
    max_frame: Size = Field(64 * 2**20, ge=2**16, le=2**30, description="largest message taken")
    local_links: bool = Field(True, description="let gateways on this host pass frames without gRPC")
    memory: Size | None = Field(
        None,
        ge=1,
        description="for experts that a router gives it; by default what the model's take, or what the GPU has free",
    )
    memory_limit: Size | None = Field(
        None,
        ge=1,
        description="for the whole process: the experts that do not fit stay on disk, those asked for least first",
    )
    speed: float | None = Field(
        None, gt=0, description="for a router, against that of other workers: say it of all; measured by default"
    )
    node: str = Field("", description="the host it runs on: a router puts no two copies of an expert on one")
    advertise: str | None = Field(None, description="HOST:PORT where gateways reach it; where it listens by default")
    socket_folder: Path | None = Field(
        None, description="a folder shared with gateways in other containers of this host, for sockets"
    )
    drain_timeout: Duration = Field(15.0, ge=0, description="how long accepted calls may go on after SIGTERM")


class CacheConfig(Section):
    """The gateway's cache of expert outputs, for int8 and int4. It is on where this section is (`cache: {}`)."""

    memory: Size = Field(256 * 2**20, ge=0, description="rows kept in the gateway's own memory; 0: none")
    redis: SecretStr | None = Field(
        None, description="redis://, rediss:// or unix:// URL of a Redis to share rows through; may hold a password"
    )
    timeout: Duration = Field(
        0.02, gt=0, le=1, description="longest wait for 32 rows from Redis; after that they are computed"
    )
    ttl: Duration | None = Field(None, ge=0.001, description="how long Redis keeps a row; by default it decides itself")
    salt: SecretStr = Field(SecretStr(""), description="deployments with different salts never share a row")

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: SecretStr | None) -> SecretStr | None:
        return check_redis_url(value)


class RouterConfig(Section):
    """The router, as it runs and as workers and gateways reach it. They use one where this section is."""

    endpoint: str | None = Field(None, description="grpc://HOST:PORT where workers and gateways reach it")
    host: str = "127.0.0.1"
    port: int = Field(50050, ge=0, le=65535, description="0 lets the system choose")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="serves metrics on it; 0: the system's choice")
    redis: SecretStr | None = Field(
        None, description="redis://, rediss:// or unix:// URL of a Redis of its own, where several routers share state"
    )
    lease: Duration = Field(10.0, ge=0.5, description="a worker is taken for dead so long after its last heartbeat")
    patience: Duration | None = Field(
        None, ge=0, description="so long after its start a router waits for workers that hold the rest; one lease"
    )
    gateway_lease: Duration = Field(
        60.0, gt=0, description="a gateway that is not heard of may use what it was told last for so long"
    )
    replicas: int = Field(1, ge=1, description="copies of every expert, at least, as far as there is room")
    rebalance: Duration = Field(30.0, gt=0, description="least time between two placements for the sake of balance")
    load_half_life: Duration = Field(60.0, gt=0, description="after so long a report of load counts half")
    move_cost: float = Field(0.02, ge=0, description="what moving one expert per worker must win, of the mean load")
    tolerance: float = Field(0.05, ge=0, description="a layer is left alone while its busiest has so little more")
    mixed_numerics: bool = Field(False, description="take workers that round differently from those there are")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None:
            split_endpoint(value)
        return value

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: SecretStr | None) -> SecretStr | None:
        return check_redis_url(value)


class TokensConfig(Section):
    """Who is who: files with one secret each. gRPC services that listen beyond loopback ask for them."""

    worker_file: Path | None = Field(None, description="a secret that workers show; only they may register")
    gateway_file: Path | None = Field(None, description="a secret that gateways show; only they may ask for rows")

    def file_of(self, role: str) -> Path | None:
        """The file of a role."""
        return {"worker": self.worker_file, "gateway": self.gateway_file}[role]


class LogConfig(Section):
    """What the processes write to standard error. Prompts and completions are never logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """A whole deployment; every key has a default."""

    model: str = Field("default", min_length=1, description="a Hugging Face folder, a fetched model's name, or a shape")
    quantization: Quantization = Field("int8", description="arithmetic of the experts")
    dtype: RowDType = Field("float32", description="element type of everything that is not int8")
    weight_version: str = Field(
        "", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="name of these weights, where another version is served, too"
    )
    gateway: GatewayConfig = GatewayConfig()
    experts: dict[str, ExpertGroupConfig] = Field(default_factory=dict)
    worker: WorkerConfig = WorkerConfig()
    cache: CacheConfig | None = Field(None, description="absent: no expert output is kept")
    router: RouterConfig | None = Field(None, description="absent: workers hold what they are told at their start")
    tokens: TokensConfig = TokensConfig()
    log: LogConfig = LogConfig()

    @property
    def reply_dtype(self) -> RowDType:
        """Of the rows that workers answer with: in int8 and int4 two bytes hold all that is exact."""
        return "bfloat16" if has_integer_rows(self.quantization) else self.dtype

    @field_validator("cache")
    @classmethod
    def _check_cache(cls, value: CacheConfig | None, info: ValidationInfo) -> CacheConfig | None:
        """A row can be used again only where its bits depend on nothing else, which is so in int8 and int4."""
        if value is not None and not has_integer_rows(info.data.get("quantization", "int8")):
            raise ValueError("works with `quantization: int8` and `int4` only; choose one, or leave `cache:` out")
        return value


def has_integer_rows(quantization: str) -> bool:
    """Whether experts of this arithmetic get their rows in int8 with scales."""
    return quantization in ("int8", "int4")


def check_redis_url(value: SecretStr | None) -> SecretStr | None:
    """The URL of a Redis as it is. Raises ValueError that does not quote it: it may hold a password."""
    if value is not None:
        url = urlsplit(value.get_secret_value())
        place = url.path if url.scheme == "unix" else url.hostname
        if url.scheme not in ("redis", "rediss", "unix") or not place or url.port == 0:  # .port checks itself
            raise ValueError("write redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH")
    return value


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``grpc://HOST:PORT``; IPv6 hosts stand in brackets. Raises ValueError."""
    match = _ENDPOINT.fullmatch(endpoint)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(f"{endpoint[:80]!r} is not an endpoint; write grpc://HOST:PORT")
    return match[1].strip("[]"), int(match[2])


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """Merge the sources in order of precedence and check the result.

    ``overrides`` are command-line values under dotted keys (``gateway.port``); a None is not set.
    Raises ConfigError that names the key, what is wrong with it, and the environment variable it came from.
    """
    merged: dict[str, Any] = read_yaml(file) if file is not None else {}
    variables: dict[tuple[str, ...], str] = {}
    for name, path, value in read_environment(os.environ if environ is None else environ):
        assign(merged, path, value)
        variables[tuple(path)] = name
    for dotted, override in (overrides or {}).items():
        if override is not None:
            assign(merged, dotted.split("."), override)
            variables.pop(tuple(dotted.split(".")), None)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(each), variables) for each in error.errors())) from None


def _explain(error: dict[str, Any], variables: Mapping[tuple[str, ...], str]) -> str:
    """One line for one pydantic error: the dotted key, where it came from, what is wrong, what to write instead."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    pairs = [(name, zip(path, location, strict=False)) for path, name in variables.items()]
    source = next((f" (from {name})" for name, parts in pairs if all(a == b for a, b in parts)), "")
    if error["type"] == "extra_forbidden":
        known = list(_schema_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}{source}: {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error["input"]
    shown = isinstance(value, str | int | float) and not _is_secret(_schema_at(location))
    return f"{key}{source}: {message}" + (f" (got {repr(value)[:80]})" if shown else "")


def _schema_at(path: list[str]) -> Any:
    """The class of the section at ``path``, or the annotation of the value there."""
    schema: Any = Config
    for name in path:
        if get_origin(schema) is dict:  # keys of the user's own, such as the groups under `experts:`
            schema = get_args(schema)[1]
        elif isinstance(schema, type) and issubclass(schema, Section) and name in schema.model_fields:
            schema = schema.model_fields[name].annotation
        if get_origin(schema) is UnionType:  # what may be absent
            schema = next((each for each in get_args(schema) if each is not NoneType), schema)
    return schema


def _is_secret(schema: Any) -> bool:
    """Whether what was written there may hold a secret: a value meant for a whole section may be its URL."""
    return any(name in str(schema) for name in ("SecretStr", "CacheConfig", "RouterConfig"))
