"""`python -m expert_service` and `consilium expert`: one expert worker."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from consilium.config import Config, load_config
from consilium.errors import ConsiliumError
from consilium.flags import service_parser
from consilium.telemetry import setup_logging
from expert_service.server import Worker

# Flags and the configuration keys they set.
FLAGS = {
    "model": ("model", "a Hugging Face folder, a fetched model's name, or a shape"),
    "weight-version": ("weight_version", "name of these weights, where another version is served beside them"),
    "quantization": ("quantization", "int8, int8-weight-only, int4, or none"),
    "dtype": ("dtype", "float32 or bfloat16: what is not int8"),
    "group": ("worker.group", "this worker's entry under experts: in the configuration"),
    "layers": ("worker.layers", "layers to hold: all, or for example 0-11,13"),
    "experts": ("worker.experts", "experts to hold in each of them: all, or for example 0-3,7"),
    "join": ("router.endpoint", "grpc://HOST:PORT of a router, which says what to hold"),
    "token-file": ("tokens.worker_file", "the secret that workers show router and peers"),
    "memory": ("worker.memory", "for experts that the router gives it, for example 8GiB"),
    "memory-limit": ("worker.memory_limit", "memory of the process; experts that do not fit stay on disk"),
    "speed": ("worker.speed", "against that of other workers, for the router; measured by default"),
    "node": ("worker.node", "name of this host: the router puts no two copies of an expert on one"),
    "advertise": ("worker.advertise", "HOST:PORT where gateways reach this worker; where it listens by default"),
    "host": ("worker.host", "address to listen on"),
    "port": ("worker.port", "port to listen on; 0 lets the system choose"),
    "metrics-port": ("worker.metrics_port", "port to serve metrics on; 0 lets the system choose; none by default"),
    "device": ("worker.device", "cpu, cuda, or auto: a GPU where there is one"),
    "threads": ("worker.threads", "compute threads; all cores by default"),
}


def main(argv: Sequence[str]) -> int:
    """Run a worker until it is told to stop; 1 when it cannot start."""
    try:
        config = parse_arguments(argv)
        setup_logging(f"expert/{config.worker.group}", config.log.level)
        asyncio.run(Worker(config).serve())
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while it loads
        return 130
    return 0


def parse_arguments(argv: Sequence[str]) -> Config:
    """The configuration with the command line on top. Raises ConfigError."""
    parser = service_parser("consilium expert", "Serve some experts of a model over gRPC.", FLAGS)
    arguments = vars(parser.parse_args(argv))
    return load_config(arguments.pop("config"), overrides=arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
