"""A hub on a loopback port, enough of one for huggingface_hub to download models from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class LocalHub:
    """Models by id: file names and contents. `requests` keeps what was asked for."""

    def __init__(self, models: dict[str, dict[str, bytes]], token: str = "") -> None:
        self.models = models
        self.token = token  # asked for, if not empty
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.requests: list[str] = []
        self.url = ""

    def answer(self, path: str, authorization: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET."""
        self.requests.append(path)
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4 if api else 2 :]
        files = self.models.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if len(rest) < 2 or rest[1] not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if api and rest[0] == "revision":
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            body = {"id": name, "sha": self.revisions[rest[1]], "siblings": siblings}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if api and rest[0] == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}
                for file, data in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if not api and rest[0] == "resolve" and rest[2] in files:
            data = files[rest[2]]
            return 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}, data
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """Serves while the block runs; `hub.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(with_body=True)

        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def _reply(self, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
