"""What huggingface_hub asks of a hub, over HTTP on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """A hub of models. ``branches[name]`` is the commit of ``main``; ``commits[name, commit]`` is a folder."""

    def __init__(self) -> None:
        self.branches: dict[str, str] = {}
        self.commits: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.sent: list[str] = []  # files, in the order they were sent
        self.asked = 0  # requests of any kind
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def push(self, name: str, folder: Path) -> str:
        """Makes the folder the newest commit of a model, and returns its hash."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        self.branches[name], self.commits[name, commit] = commit, folder
        return commit

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        if len(parts) < 4:
            return _send(request, 404)
        name, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        if name not in self.branches:
            return _send(request, 404, error="RepoNotFound")
        if name in self.gated:
            return _send(request, 403, error="GatedRepo")
        commit = self.branches[name] if revision == "main" else revision
        folder = self.commits.get((name, commit))
        if folder is None:
            return _send(request, 404, error="RevisionNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if kind == "revision":
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            return _send(request, 200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if kind == "tree":
            rows = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _hash(path)}
                for path in files
            ]
            return _send(request, 200, json.dumps(rows).encode())
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return _send(request, 404, error="EntryNotFound")
        if request.command == "GET":
            self.sent.append(file.name)
        return _send(request, 200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_hash(file)}"'})


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    error: str = "",
) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    if error:
        request.send_header("X-Error-Code", error)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)
