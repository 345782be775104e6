"""A Hub on 127.0.0.1 that knows models, in memory: what the client asks to create, commit, list and read files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OTHERS = "others"  # whose repositories nobody here may write


class FakeHub:
    """Commits by repository, the newest last; each is (hash, files by name)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.commits[repo][-1][1]) if self.commits[repo] else {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        name = hashlib.sha1(f"{repo} {len(self.commits[repo])}".encode()).hexdigest()
        self.commits[repo].append((name, files))
        return name

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo, [])
        return next(((name, files) for name, files in reversed(commits) if revision in ("main", name)), None)


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer a-token":
            return self._answer(401, {"error": "Invalid token"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path)
        assert found, self.path
        repo, what = found.groups()
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        name = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        return self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == OTHERS:
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if repo in self.hub.commits:
            return self._answer(409, {"url": f"{self.hub.url}/{repo}"})
        self.hub.commits[repo] = []
        self.hub.private[repo] = asked.get("visibility") == "private"
        self.hub.commit(repo, [{"key": "file", "value": {"path": ".gitattributes", "content": ""}}])
        return self._answer(200, {"url": f"{self.hub.url}/{repo}"})

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?$", path)
        if path == "/":  # whether anybody is there
            return self._answer(200, b"")
        assert found, path
        repo, what, revision, name = found.groups()
        if repo not in self.hub.commits:
            return self._answer(401, {"error": "Repository not found"})
        if (commit := self.hub.find(repo, revision or "main")) is None:
            return self._answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        oid, files = commit
        if what == "tree":
            rows = [{"type": "file", "path": p, "size": len(c), "oid": _hash(c)} for p, c in files.items()]
            return self._answer(200, json.dumps(rows).encode())
        if what == "resolve":
            return self._answer(200, files[name], X_Repo_Commit=oid, ETag=f'"{_hash(files[name])}"')
        return self._answer(200, {"id": repo, "modelId": repo, "sha": oid, "siblings": [], "private": False})

    def do_HEAD(self) -> None:
        self.do_GET()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve() -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
