"""`python -m consilium.health URL`: exits with 0 where a service is well, for probes that run a command.

``http://HOST:PORT/PATH`` must answer 200; at ``grpc://HOST:PORT`` the standard health service must say SERVING.
Imports as little as it can: it is started again for every probe.
"""

from __future__ import annotations

import http.client
import sys
from urllib.parse import urlsplit

USAGE = "usage: python -m consilium.health http://HOST:PORT/PATH | grpc://HOST:PORT"
SECONDS = 5.0
_SERVING = b"\x08\x01"  # HealthCheckResponse(status=SERVING), as it travels


def main(arguments: list[str]) -> int:
    """0 when the service is well; 1, with one line that says why not; 2 for anything but one URL."""
    url = urlsplit(arguments[0]) if len(arguments) == 1 else urlsplit("")
    try:
        if url.hostname is None or url.port is None or url.scheme not in ("http", "grpc"):
            raise ValueError("not a URL that can be asked")
        check = check_http if url.scheme == "http" else check_grpc
    except ValueError:
        print(USAGE, file=sys.stderr)
        return 2
    problem = check(url.netloc, url.path or "/")
    if problem is not None:
        print(f"{arguments[0]}: {problem}", file=sys.stderr)
    return int(problem is not None)


def check_http(address: str, path: str) -> str | None:
    """What is wrong, or None when GET ``path`` is answered with 200. Proxies from the environment are not asked."""
    connection = http.client.HTTPConnection(address, timeout=SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return None if answer.status == http.client.OK else f"{answer.status} {text}"


def check_grpc(address: str, _path: str) -> str | None:
    """What is wrong, or None when the server's health service says that it serves."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return None if answer == _SERVING else "it says that it does not serve"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
