"""A stand-in for the Hugging Face hub's HTTP API, on 127.0.0.1: uploads and downloads of models."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """A model: branches, their commits, and whether it is private."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds and has been asked."""

    url: str = ""
    account: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user",
            "name": "me",
            "orgs": [{"name": "team"}],
            "auth": {"type": "access_token", "accessToken": {"role": "write"}},
        }
    )
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, int | None] = field(default_factory=dict)
    """A regular expression of "METHOD path" -> its status; None: the connection is dropped."""

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[name].branches[branch]


Reply = tuple[int, Any]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        asked = f"{self.command} {path}"
        self.hub.requests.append((self.command, path))
        for pattern, status in self.hub.failures.items():
            if re.search(pattern, asked):
                if status is None:
                    self.close_connection = True
                    return
                self._reply(status, {"error": f"refused with {status}"})
                return
        needs_token = (path.startswith("/api/") and self.command != "GET") or "whoami" in path
        if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply(401, {"error": "Invalid credentials in Authorization header"})
            return
        for pattern, answer in _ROUTES:
            if found := re.fullmatch(pattern, asked):
                self._reply(*answer(self, body, *found.groups()))
                return
        self._reply(404, {"error": "no such place"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def whoami(self, body: bytes) -> Reply:
        return 200, self.hub.account

    def create(self, body: bytes) -> Reply:
        asked = json.loads(body)
        name = f"{asked['organization'] or self.hub.account['name']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return 409, answer | {"error": "You already created this model repo"}
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        return 200, answer

    def branch(self, body: bytes, name: str, branch: str) -> Reply:
        branches = self.hub.repositories[name].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def validate(self, body: bytes) -> Reply:
        text = json.loads(body)["content"]
        yaml.safe_load(text.split("---")[1])
        return 200, {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, branch: str) -> Reply:
        if name not in self.hub.repositories:
            return 404, {"error": "Repository not found"}
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def batch(self, body: bytes, name: str) -> Reply:
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{each['oid']}"}
            objects.append(each | {"actions": {"upload": upload}})
        return 200, {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, oid: str) -> Reply:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        return 200, b""

    def commit(self, body: bytes, name: str, branch: str) -> Reply:
        lines = [json.loads(line) for line in body.splitlines()]
        repository = self.hub.repositories[name]
        files = repository.branches[branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append({"branch": branch, "operations": lines})
        oid = f"{len(repository.commits):040x}"
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}

    def info(self, body: bytes, name: str, branch: str) -> Reply:
        if name not in self.hub.repositories:
            return 404, {"error": "Repository not found"}
        oid = f"{len(self.hub.repositories[name].commits):040x}"
        return 200, {"id": name, "sha": oid, "siblings": []}

    def tree(self, body: bytes, name: str, branch: str) -> Reply:
        files = self._files(name, branch)
        return 200, [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
            for path, data in files.items()
        ]

    def resolve(self, body: bytes, name: str, branch: str, path: str) -> tuple[int, Any, Any]:
        data = self._files(name, branch)[path]
        commit = f"{len(self.hub.repositories[name].commits):040x}"
        return 200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit}

    def _files(self, name: str, branch: str) -> dict[str, bytes]:
        branches = self.hub.repositories[name].branches
        return branches.get(branch, branches["main"])


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)", _Handler.store),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serves an empty hub until the context is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
