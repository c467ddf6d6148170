"""The configuration of a deployment: its schema, and how file, environment and command line become one.

Order of precedence: command line, environment (``CONSILIUM_GATEWAY__PORT``), YAML file, defaults.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from consilium.errors import ConfigError
from consilium.units import Duration, Size

ENV_PREFIX = "CONSILIUM_"
ENDPOINT_SCHEME = "grpc://"

Quantization = Literal["none", "int8"]
RowDType = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """One mapping in the YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GatewayConfig(Section):
    """The gateway: the address it listens on, and how much it takes on at once."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 lets the system choose")
    served_model_name: str | None = Field(None, description="the name clients use; the model's own by default")
    api_keys: tuple[SecretStr, ...] = Field((), description="accepted bearer keys; none means no key is asked for")
    max_running: int = Field(64, ge=1, le=4096, description="most sequences in one step")
    max_waiting: int = Field(256, ge=0, le=65536, description="most sequences queued; more are answered with 429")
    max_model_len: int | None = Field(None, ge=1, description="most tokens of prompt and completion together")
    max_step_tokens: int = Field(512, ge=1, le=65536, description="most tokens computed in one step")
    kv_cache_memory: Size = Field(2 * 2**30, ge=2**20, description="memory for keys and values")
    layer_timeout: Duration = Field(60.0, gt=0, description="most time a layer waits for its experts, with retries")
    threads: int | None = Field(None, ge=1, description="compute threads of the engine; all cores by default")
    drain_timeout: Duration = Field(30.0, ge=0, description="how long running requests may go on after SIGTERM")


class ExpertGroupConfig(Section):
    """One group of expert workers, as the gateway reaches it. Several addresses are replicas."""

    endpoint: str | tuple[str, ...] = Field(description="grpc://HOST:PORT, or a list of them")
    max_batch: int = Field(4096, ge=1, le=2**20, description="most rows of one compute batch in a worker")
    timeout: Duration = Field(30.0, gt=0, description="most time for one compute batch; a larger frame gets more")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for endpoint in (value,) if isinstance(value, str) else value:
            split_endpoint(endpoint)
        if not value:
            raise ValueError("at least one endpoint is needed, for example grpc://127.0.0.1:50051")
        return value

    @property
    def endpoints(self) -> tuple[str, ...]:
        return (self.endpoint,) if isinstance(self.endpoint, str) else self.endpoint


class WorkerConfig(Section):
    """One expert worker process."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0 lets the system choose")
    group: str = Field("experts", min_length=1, description="its entry under `experts:`")
    layers: str = Field("all", description="layers it holds: all, or for example 0-11,13")
    experts: str = Field("all", description="experts it holds in each of them: all, or for example 0-3,7")
    threads: int | None = Field(None, ge=1, description="compute threads; all cores by default")
    max_queue: int = Field(1024, ge=1, description="most calls waiting; more are answered with RESOURCE_EXHAUSTED")
    max_frame: Size = Field(64 * 2**20, ge=2**16, le=2**30, description="largest message taken")
    drain_timeout: Duration = Field(15.0, ge=0, description="how long accepted calls may go on after SIGTERM")


class LogConfig(Section):
    """What the processes write to standard error. Prompts and completions are never logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """A whole deployment; every key has a default."""

    model: str = Field("default", min_length=1, description="a Hugging Face folder, or the name of a fetched model")
    quantization: Quantization = Field("int8", description="arithmetic of the experts")
    dtype: RowDType = Field("float32", description="element type of everything that is not int8")
    gateway: GatewayConfig = GatewayConfig()
    experts: dict[str, ExpertGroupConfig] = Field(default_factory=dict)
    worker: WorkerConfig = WorkerConfig()
    log: LogConfig = LogConfig()


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``grpc://HOST:PORT``; IPv6 hosts stand in brackets. Raises ValueError."""
    host, colon, port = endpoint.removeprefix(ENDPOINT_SCHEME).rpartition(":")
    if not endpoint.startswith(ENDPOINT_SCHEME) or not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{endpoint!r} is not an endpoint; write grpc://HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Config:
    """Merge the sources in order of precedence and check the result.

    ``overrides`` are command-line values under dotted keys (``gateway.port``); a None is not set.
    Raises ConfigError that names the key, its source's value and the nearest known key.
    """
    merged: dict[str, Any] = _read_yaml(file) if file is not None else {}
    for path, value in _environment(os.environ if environ is None else environ):
        _assign(merged, path, value)
    for dotted, override in (overrides or {}).items():
        if override is not None:
            _assign(merged, dotted.split("."), override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(each)) for each in error.errors())) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping at the top, for example `experts:`")
    return content


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[list[str], Any]]:
    """Paths and values of the variables that carry our prefix; a value is read as YAML where that gives a list."""
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and name not in ENV_RESERVED:
            value = yaml.safe_load(text) if text.lstrip().startswith(("[", "{")) else text
            yield name.removeprefix(ENV_PREFIX).lower().split("__"), value


# Variables with our prefix that are not configuration: where fetched models are kept.
ENV_RESERVED = frozenset({"CONSILIUM_CACHE"})


def _assign(tree: dict[str, Any], path: list[str], value: object) -> None:
    """Set a nested key; the mappings on the way are copied, so that no caller's value changes."""
    for key in path[:-1]:
        below = tree.get(key)
        tree[key] = dict(below) if isinstance(below, dict) else {}
        tree = tree[key]
    tree[path[-1]] = value


def _explain(error: dict[str, Any]) -> str:
    """One line for one pydantic error: the dotted key, what is wrong, and what to write instead."""
    location = [str(part) for part in error["loc"] if part not in ("str", "tuple[str, ...]")]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if error["type"] == "missing" else f" (got {error['input']!r})")


def _known_keys(path: list[str]) -> list[str]:
    """The keys of the section at ``path``; below a free-named mapping such as `experts:` the name is skipped."""
    section: type[BaseModel] = Config
    names = iter(path)
    for name in names:
        annotation = section.model_fields[name].annotation
        arguments = get_args(annotation)
        if arguments and isinstance(arguments[-1], type):
            next(names, None)
            annotation = arguments[-1]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
