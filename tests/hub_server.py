"""A Hub of our own on this machine: the endpoints that huggingface_hub calls, over real HTTP, with faults on demand.

Repositories are lists of commits, each a dict from name to bytes. Large files go by the LFS protocol, as on the Hub.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "hf_owner"


@dataclass
class Repository:
    """What the Hub has under a name; `commits` are (id, files), the last one is main."""

    private: bool = False
    gated: Any = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], deleted: Sequence[str] = ()) -> str:
        """Add a commit on top."""
        before = self.commits[-1] if self.commits else ("", {})
        whole = {name: data for name, data in (before[1] | files).items() if name not in deleted}
        facts = json.dumps([before[0], sorted((name, len(data)) for name, data in whole.items()), len(self.commits)])
        self.commits.append((hashlib.sha1(facts.encode()).hexdigest(), whole))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit by its id, or main."""
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """What happens to the next requests whose method and path contain these words: a status, or a body cut short."""

    words: str
    status: int = 0
    cut_at: int | None = None
    times: int = 1


@dataclass
class Hub:
    """The server's memory: what is stored, what was asked, and what is to go wrong."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    before_download: Any = None

    def fault(self, request: str) -> Fault | None:
        """The fault that this request runs into, if any; each is spent by its `times`."""
        for fault in self.faults:
            if fault.times and all(word in request for word in fault.words.split()):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def answer(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        """Send a whole answer; what is not bytes goes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error as the Hub sends it."""
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    @property
    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {OWNER}"

    def handle_any(self) -> None:
        """Any request: a fault that waits for it, or the endpoint."""
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault is not None and fault.status:
            _ = self.body
            self.refuse(fault.status, "", "out of order")
            return
        parts = [part for part in path.split("/") if part]
        try:
            if parts[:1] == ["api"]:
                self.api(parts[1:])
            elif parts[:1] == ["lfs"]:
                self.hub.blobs[parts[1]] = self.body
                self.answer(200)
            elif parts[2:3] == ["info"] or parts[1].endswith(".git"):
                self.lfs_batch()
            else:
                self.resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]), fault)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def api(self, parts: list[str]) -> None:
        """The JSON interface."""
        body = self.body
        if parts == ["whoami-v2"]:
            self.answer(200, {"name": "ann", "type": "user"}) if self.is_owner else self.refuse(401, "", "no token")
            return
        if parts == ["validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
            return
        if parts == ["repos", "create"]:
            self.create(json.loads(body))
            return
        if parts[:2] == ["repos", "move"] or parts[0] != "models":
            self.refuse(404, "", "no such endpoint")
            return
        repo, rest = f"{parts[1]}/{parts[2]}", parts[3:]
        if (found := self.visible(repo)) is None:
            return
        match rest:
            case [] | ["revision", _]:
                self.info(repo, found, rest[1] if rest else "main")
            case ["settings"]:
                found.gated = json.loads(body).get("gated", found.gated)
                self.answer(200, {})
            case ["preupload", _]:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in files
                ]
                self.answer(200, {"files": modes})
            case ["commit", _]:
                self.commit(repo, found, body)
            case ["paths-info", revision]:
                self.paths_info(found, revision, body)
            case ["tree", revision, *_]:
                self.paths_info(found, revision, None)
            case _:
                self.refuse(404, "", f"no such endpoint {rest}")

    def create(self, facts: dict[str, Any]) -> None:
        """Make a repository."""
        if not self.is_owner:
            self.refuse(401, "", "no token")
            return
        repo = f"{facts.get('organization') or 'ann'}/{facts['name']}"
        if repo in self.hub.repositories:
            self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            return
        self.hub.repositories[repo] = Repository(
            private=bool(facts.get("private")) or facts.get("visibility") == "private"
        )
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})

    def visible(self, repo: str) -> Repository | None:
        """A repository that this caller may see; the refusal is sent else."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.is_owner):
            self.refuse(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def info(self, repo: str, found: Repository, revision: str) -> None:
        commit = found.at(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", "no such revision")
            return
        self.answer(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": commit[0],
                "private": found.private,
                "gated": found.gated,
                "siblings": [{"rfilename": name} for name in sorted(commit[1])],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            },
        )

    def commit(self, repo: str, found: Repository, body: bytes) -> None:
        """One commit: small files in it, large ones by their SHA-256."""
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, found.commits[-1][0]):
            self.refuse(412, "", "A commit has happened since")
            return
        if not self.is_owner:
            self.refuse(403, "", "not yours")
            return
        files = {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                if (blob := self.hub.blobs.get(line["value"]["oid"])) is None:
                    self.refuse(400, "", "a large file was not uploaded")
                    return
                files[line["value"]["path"]] = blob
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        oid = found.commit(files, deleted)
        self.answer(
            200,
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""},
        )

    def paths_info(self, found: Repository, revision: str, body: bytes | None) -> None:
        commit = found.at(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", "no such revision")
            return
        wanted = None
        if body is not None:
            kind = self.headers.get("Content-Type", "")
            wanted = (
                json.loads(body)["paths"] if "json" in kind else [part for part in body.decode().split("&") if part]
            )
            wanted = [unquote(one.removeprefix("paths=")) for one in ([wanted] if isinstance(wanted, str) else wanted)]
        files = []
        for name, data in sorted(commit[1].items()):
            if wanted is None or name in wanted:
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
                if name.endswith(".safetensors"):
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                files.append(entry)
        self.answer(200, files)

    def lfs_batch(self) -> None:
        """Where to put large files: nowhere, if they are here."""
        objects = []
        for one in json.loads(self.body)["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def resolve(self, repo: str, revision: str, name: str, fault: Fault | None) -> None:
        """A file, or a part of it."""
        if (found := self.visible(repo)) is None:
            return
        if found.gated and not self.is_owner:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        if self.hub.before_download is not None:
            self.hub.before_download(found)
        commit = found.at(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", "no such revision")
            return
        if name not in commit[1]:
            self.refuse(404, "EntryNotFound", "no such file")
            return
        data = commit[1][name]
        tag = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else sha1(data)
        headers = {"X_Repo_Commit": commit[0], "ETag": f'"{tag}"', "Accept_Ranges": "bytes"}
        status = 200
        if (asked := self.headers.get("Range")) and self.command == "GET":
            self.hub.ranges.append(asked)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) if last else len(data) - 1, len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if fault is not None and fault.cut_at is not None and self.command == "GET":
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: fault.cut_at])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.answer(status, data, **headers)


def sha1(data: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
