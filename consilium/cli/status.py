"""`consilium status`: what a router knows."""

from __future__ import annotations

import argparse
from pathlib import Path

from consilium.config import load_config
from consilium.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Its flags."""
    parser = commands.add_parser(
        "status",
        help="show workers, leases, placement and load, as a router knows them",
        description="Asks a router once a second and shows workers, leases, copies, balance and the hottest experts, "
        "until Ctrl-C. Where the output is no terminal, or with --once or --json, it asks once.",
    )
    parser.add_argument("--router", metavar="URL", help="grpc://HOST:PORT; router.endpoint of the configuration")
    parser.add_argument("--token-file", metavar="FILE", help="the gateways' secret, where the router asks for one")
    parser.add_argument("--weight-version", metavar="NAME", help="of which weights, where several are served")
    parser.add_argument("--config", metavar="FILE", help="YAML configuration")
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.add_argument("--json", action="store_true", help="print it once, as JSON")
    parser.set_defaults(command=show)


def show(options: argparse.Namespace) -> int:
    """Print or follow the status. Raises ConfigError, and NotReady when the router cannot be asked."""
    from consilium import router_status, tokens  # bring gRPC

    overrides = {
        "router.endpoint": options.router,
        "tokens.gateway_file": options.token_file,
        "weight_version": options.weight_version,
    }
    config = load_config(Path(options.config) if options.config else None, overrides=overrides)
    if config.router is None or config.router.endpoint is None:
        raise ConfigError("router.endpoint: which router? Say grpc://HOST:PORT with --router, or name it in the file")
    metadata = tokens.metadata_of(config.tokens, tokens.GATEWAY)
    version = config.weight_version
    router_status.show(config.router.endpoint, metadata, version, as_json=options.json, once=options.once)
    return 0
