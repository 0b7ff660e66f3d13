"""A hub on loopback: as much of the Hugging Face hub's HTTP interface as its client uses for a push and a download.

Written from the client's requests. Files ending in .safetensors go through LFS, as there; commits are checked against
their parent, and are numbered, since nobody looks at what a hash is made of.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Repository:
    """What one repository holds: its commits, by hash, the newest last, each with all its files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes]) -> str:
        """Add a commit that changes these files."""
        number = f"{len(self.commits):x}"
        commit = hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()
        self.commits[commit] = {**(self.files() if self.commits else {}), **files}
        return commit

    @property
    def head(self) -> str:
        """The newest commit."""
        return list(self.commits)[-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return self.commits[self.resolve(revision)]

    def resolve(self, revision: str) -> str:
        """The commit of a revision; KeyError where there is none."""
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        if commit not in self.commits:
            raise KeyError(revision)
        return commit


@dataclass
class Hub:
    """The server's repositories by name, what was uploaded for them, and every request that came."""

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails: str | None = None  # requests to a path that holds this are answered by an error of the server

    def make(self, name: str, **options: Any) -> Repository:
        """A new repository with the file that the hub puts into each."""
        self.repositories[name] = repository = Repository(**options)
        repository.add({".gitattributes": b""})
        return repository


class Refused(Exception):
    """An answer that is an error: its status, and the code that the client looks at."""

    def __init__(self, status: int, code: str = "", text: str = "refused") -> None:
        super().__init__(text)
        self.status, self.code, self.text = status, code, text


class Answering(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.fails and self.hub.fails in path:
                raise Refused(500)
            self._answer(path, body)
        except Refused as refused:
            self._send(refused.status, refused.text.encode(), {"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or ((repository.private or write) and not self._is_owner):
            raise Refused(404 if self._is_owner else 401, "RepoNotFound")
        return repository

    def _answer(self, path: str, body: bytes) -> None:
        routes = {
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": lambda _: self._json({"errors": [], "warnings": []}),
            r"/api/models/([^/]+/[^/]+)": self._info,
            r"/api/models/([^/]+/[^/]+)/preupload/.+": self._preupload,
            r"/api/models/([^/]+/[^/]+)/commit/main": self._commit,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/objects/(\w+)": self._object,
            r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)": self._resolve,
        }
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match:
                return answer(body, *match.groups())
        raise Refused(404, text=f"no such route: {path}")

    def _create(self, body: bytes) -> None:
        if not self._is_owner:
            raise Refused(401, text="Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            raise Refused(409, text=json.dumps({"error": "You already created this model repo", "url": url}))
        self.hub.make(name, private=asked.get("visibility") == "private")
        self._json({"url": url})

    def _info(self, body: bytes, name: str) -> None:
        held = self._repository(name)
        siblings = [{"rfilename": file} for file in held.files()]
        self._json({"id": name, "sha": held.head, "private": held.private, "siblings": siblings})

    def _preupload(self, body: bytes, name: str) -> None:
        self._repository(name, write=True)
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": told})

    def _batch(self, body: bytes, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/objects/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._send(
            200, json.dumps({"transfer": "basic", "objects": objects}).encode(), {"Content-Type": "application/json"}
        )

    def _object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, text="other bytes")
        self.hub.objects[oid] = body
        self._send(200, b"")

    def _commit(self, body: bytes, name: str) -> None:
        held = self._repository(name, write=True)
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            asked = json.loads(line)
            value = asked["value"]
            if asked["key"] == "header" and value.get("parentCommit") not in (None, held.head):
                raise Refused(412, text="the parent is not the newest commit")
            if asked["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if asked["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = held.add(files)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        held = self._repository(name)
        if held.gated and not self._is_owner:
            raise Refused(403, "GatedRepo")
        try:
            commit = held.resolve(revision)
        except KeyError as error:
            raise Refused(404, "RevisionNotFound") from error
        content = held.commits[commit].get(file)
        if content is None:
            raise Refused(404, "EntryNotFound")
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Run a hub on loopback for as long as the block lasts."""
    handler = type("Handler", (Answering,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
