"""`python -m gateway` and `consilium gateway`: the HTTP process, which starts the engine process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from consilium.config import Config, load_config
from consilium.errors import ConfigError, ConsiliumError
from consilium.flags import service_parser
from consilium.telemetry import setup_logging
from gateway.served_model import load_served_model
from gateway.server import serve

# Flags and the configuration keys they set.
FLAGS = {
    "model": ("model", "a Hugging Face folder, a fetched model's name, or a shape"),
    "weight-version": ("weight_version", "name of these weights, where another version is served beside them"),
    "quantization": ("quantization", "arithmetic of the experts: int8, int8-weight-only, int4, or none"),
    "dtype": ("dtype", "float32 or bfloat16: what is not int8"),
    "router": ("router.endpoint", "grpc://HOST:PORT of the router that knows the workers"),
    "token-file": ("tokens.gateway_file", "the secret that gateways show router and workers"),
    "device": ("gateway.device", "cpu, cuda, or auto: a GPU where there is one that can"),
    "host": ("gateway.host", "address to listen on"),
    "port": ("gateway.port", "port to listen on; 0 lets the system choose"),
    "threads": ("gateway.threads", "compute threads of the engine; all cores by default"),
}


def main(argv: Sequence[str]) -> int:
    """Run a gateway until it is told to stop; 1 when it cannot start, or loses its engine."""
    try:
        config = parse_arguments(argv)
        setup_logging("gateway", config.log.level)
        return asyncio.run(serve(config, load_served_model(config)))
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while it loads
        return 130


def parse_arguments(argv: Sequence[str]) -> Config:
    """The configuration with the command line on top. Raises ConfigError."""
    parser = service_parser("consilium gateway", "Serve a model over HTTP, its experts over gRPC.", FLAGS)
    parser.add_argument(
        "--group-endpoint",
        action="append",
        default=[],
        metavar="NAME=grpc://HOST:PORT",
        help="where a group of experts is reached; may be repeated, also for the replicas of one group",
    )
    arguments = vars(parser.parse_args(argv))
    endpoints = _endpoints(arguments.pop("group_endpoint"))
    return load_config(arguments.pop("config"), overrides=arguments | endpoints)


def _endpoints(given: Sequence[str]) -> dict[str, object]:
    """Configuration keys and values of `NAME=ENDPOINT` arguments; those of one name are a list."""
    groups: dict[str, object] = {}
    addresses: dict[str, list[str]] = {}
    for each in given:
        name, equals, endpoint = each.partition("=")
        if not equals or not name or "." in name:
            raise ConfigError(f"--group-endpoint {each!r}: write NAME=grpc://HOST:PORT, with no dot in the name")
        addresses.setdefault(name, []).append(endpoint)
        groups[f"experts.{name}.endpoint"] = addresses[name]
    return groups


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
