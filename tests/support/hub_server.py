"""A small server that speaks the hub's protocol on loopback: HEAD and GET of files at a revision, faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1 << 20  # files of this size and more have the etag of large files, their sha256


@dataclass
class Repository:
    """Files at one commit, by name; what a faulty hub does with them."""

    files: dict[str, bytes]
    commit: str = COMMIT
    revisions: tuple[str, ...] = ("main",)
    status: int = 200  # of every answer
    error: str = ""  # X-Error-Code
    sent: dict[str, bytes] = field(default_factory=dict)  # what arrives instead of a file
    cut: dict[str, int] = field(default_factory=dict)  # file -> after how many bytes every answer breaks off
    elsewhere: bool = False  # large files are on another host, which the hub sends to and speaks for
    dripping: str = ""  # what comes byte by byte and never ends: the headers of "HEAD" or "GET", or the "body"
    held_at: int = 0  # bytes after which an answer waits for `gate`; 0 for none
    gate: threading.Event = field(default_factory=threading.Event)


class Hub:
    """The server; `log` holds every request as (method, path, token)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.closed = False
        self.log: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Fall silent, on connections that are open too."""
        self.closed = True
        self.server.shutdown()
        self.server.server_close()

    def requests(self, method: str, name: str = "") -> list[str]:
        """Paths that were asked for."""
        return [path for m, path, _ in self.log if m == method and path.endswith(name)]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if self.closed:
            request.close_connection = True
            return None
        path = unquote(urlsplit(request.path).path)
        self.log.append((request.command, path, request.headers.get("Authorization")))
        if path.startswith("/elsewhere/"):
            _, _, owner, name, file = path.split("/", 4)
            return self._send(request, self.repositories[f"{owner}/{name}"], file, body)
        owner, name, resolve, rest = [*path.strip("/").split("/", 3), "", "", "", ""][:4]
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None or resolve != "resolve":
            return self._fail(request, 401, "RepoNotFound")
        if repository.status != 200:
            return self._fail(request, repository.status, repository.error)
        revision, _, file = rest.partition("/")
        if revision not in (*repository.revisions, repository.commit):
            return self._fail(request, 404, "RevisionNotFound")
        if file not in repository.files:
            return self._fail(request, 404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        if repository.elsewhere and len(repository.files[file]) >= LARGE:
            return self._send_on(request, repository, file, f"{owner}/{name}")
        return self._send(request, repository, file, body)

    def _send_on(self, request: BaseHTTPRequestHandler, repository: Repository, file: str, name: str) -> None:
        data = repository.files[file]
        request.send_response(302)
        request.send_header("X-Repo-Commit", repository.commit)
        request.send_header("X-Linked-ETag", f'"{etag_of(data)}"')
        request.send_header("X-Linked-Size", str(len(data)))
        request.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere/{name}/{file}")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, repository: Repository, file: str, body: bool) -> None:
        data = repository.files[file]
        etag = etag_of(data)
        if body:
            data = repository.sent.get(file, data)
        if repository.dripping == request.command:
            return self._drip(request, b"HTTP/1.1 200 OK\r\nX-Long: ")
        request.send_response(200)
        if not request.path.startswith("/elsewhere/"):
            request.send_header("X-Repo-Commit", repository.commit)
            request.send_header("ETag", f'"{etag}"')
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not body:
            return None
        if repository.dripping == "body":
            return self._drip(request, b"")
        end = min(len(data), repository.cut.get(file, len(data)))
        for at in range(0, end, 1 << 20):
            if 0 < repository.held_at <= at:
                repository.gate.wait()
            request.wfile.write(data[at : min(end, at + (1 << 20))])
        if end < len(data):
            request.close_connection = True
        return None

    def _drip(self, request: BaseHTTPRequestHandler, begin: bytes) -> None:
        request.close_connection = True
        with suppress(OSError):
            request.wfile.write(begin)
            while not self.closed:
                request.wfile.write(b"x")
                time.sleep(0.1)

    @staticmethod
    def _fail(request: BaseHTTPRequestHandler, status: int, error: str, headers: dict[str, str] | None = None) -> None:
        text = json.dumps({"error": error}).encode()
        request.send_response(status)
        for name, value in {"X-Error-Code": error, "Content-Length": str(len(text)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(text)


def etag_of(data: bytes) -> str:
    """What the hub tells: git's hash of a small file, the SHA-256 of a large one."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """A checkpoint's folder as a repository's files."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
