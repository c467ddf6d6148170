"""A stand-in for the HTTP API of a Hugging Face hub: one repository, out of a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

REPO, COMMIT, TOKEN = "org/tiny", "0123456789abcdef0123456789abcdef01234567", "hf_secret"


class Request(NamedTuple):
    """One that was made."""

    method: str
    file: str  # of the repository; empty for the API
    range: str | None


class Hub:
    """What it has, how it answers, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.gated = False  # only who sends TOKEN gets anything
        self.cut: str | None = None  # of this file the first answer ends in the middle: the connection is closed
        self.endpoint = ""

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def got(self, method: str = "GET") -> set[str]:
        """The files that were asked for."""
        return {request.file for request in self.requests if request.method == method and request.file}


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A hub on a port of the system's choice."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at ``requests``."""

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        file = path.partition(f"{REPO}/resolve/")[2].partition("/")[2]
        self.hub.requests.append(Request(self.command, file, self.headers.get("Range")))
        if self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not path.removeprefix("api/models/").startswith(REPO):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif file:
            self._file(self.hub.folder / file)
        else:
            self._api(path.partition(REPO)[2].strip("/").split("/"))

    def _api(self, path: list[str]) -> None:
        if len(path) > 1 and path[1] not in ("main", COMMIT):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path[0] == "tree":
            self._json([self._entry(file) for file in self.hub.files()])
        else:
            siblings = [{"rfilename": file} for file in self.hub.files()]
            self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})

    def _entry(self, file: str) -> dict[str, object]:
        content = (self.hub.folder / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        stated = self.headers.get("Range")
        if stated is None:
            cut = file.name == self.hub.cut and self.command == "GET"
            self.hub.cut = None if cut else self.hub.cut
            self._send(200, content, headers, cut=cut)
            return
        start, _, end = stated.removeprefix("bytes=").partition("-")
        last = int(end) if end else len(content) - 1
        headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        self._send(206, content[int(start) : last + 1], headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True
