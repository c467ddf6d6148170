"""`python -m router_service` and `consilium router`: one router."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from consilium.config import Config, load_config
from consilium.errors import ConsiliumError
from consilium.flags import service_parser
from consilium.telemetry import setup_logging
from router_service.server import Router

# Flags and the configuration keys they set.
FLAGS = {
    "model": (
        "model",
        "a Hugging Face folder, a fetched model's name, or a shape: its config.json is read, no weights",
    ),
    "quantization": ("quantization", "int8, int8-weight-only, int4, or none; workers must be the same"),
    "dtype": ("dtype", "float32 or bfloat16: what is not int8"),
    "host": ("router.host", "address to listen on"),
    "port": ("router.port", "port to listen on; 0 lets the system choose"),
    "metrics-port": ("router.metrics_port", "port to serve metrics on; 0 lets the system choose; none by default"),
    "replicas": ("router.replicas", "copies of every expert, as far as there is room"),
    "patience": ("router.patience", "so long it waits for workers that hold what is missing; one lease by default"),
    "worker-token-file": ("tokens.worker_file", "a secret that workers show"),
    "gateway-token-file": ("tokens.gateway_file", "a secret that gateways show"),
}


def main(argv: Sequence[str]) -> int:
    """Run a router until it is told to stop; 1 when it cannot start."""
    try:
        config = parse_arguments(argv)
        setup_logging("router", config.log.level)
        asyncio.run(Router(config).serve())
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # Ctrl-C while it starts
        return 130
    return 0


def parse_arguments(argv: Sequence[str]) -> Config:
    """The configuration with the command line on top. Raises ConfigError."""
    parser = service_parser("consilium router", "Decide which worker holds which experts.", FLAGS)
    arguments = vars(parser.parse_args(argv))
    return load_config(arguments.pop("config"), overrides=arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
